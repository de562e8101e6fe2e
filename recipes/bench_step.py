"""What a training step costs: the ways of `AGSMRegularizer` against the published arrangement.

    python recipes/bench_step.py
    python recipes/bench_step.py --device cuda --dtype bfloat16 --compile

Soft tokens are trained on the world's denoisers: "flow", a small SD3, and "epsilon", a small UNet.
A batch has max(4, K) images and 16 tokens of text a caption. A step is all from the denoiser's
passes to the optimizer and the EMA.

The published arrangement, restated in our own words, makes one EMA pass and one student pass a
caption, each over the whole batch; the K student graphs are kept and run backward together. The
others are AGSMRegularizer's:

    exact            all captions in one pass
    gamma- = 0       exact, and the negatives are not trained
    one negative     one random negative an image is trained: negatives_per_step=1
    chunks of 8      8 samples a pass, run again in the backward pass: chunk_size=8
    memory-flat, 8   8 samples a pass, each run backward at once: chunk_size=8, backward=...
    memory-flat, 64  the same with 64 samples

All but "gamma- = 0" and "one negative" have the published loss and gradients. They take turns, and
time is a ratio to the published step of the same turn: the median over turns, with quartiles. On
the CPU one thread is used, and time is processor time, in which waiting for other programs does not
count. Memory is the peak of two steps over what was there before, in a process of its own: the
resident set on the CPU (Linux), what torch has allocated on a GPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank, Candidates, InBatch, Passes
from agsm_loss.integrations.denoisers import TokenDenoiser
from bench_loss import plain, resident_mib

MODELS = Path(__file__).parent / "models"
TEXT = 16  # tokens
DENOISERS: dict[str, Any] = {
    "flow": (SD3Transformer2DModel, "transformer"),
    "epsilon": (UNet2DConditionModel, "unet"),
}
PUBLISHED = "published"
# name -> γ⁻, and the settings of Passes
ARRANGEMENTS: dict[str, tuple[float, Passes]] = {
    "exact": (1.0, Passes()),
    "gamma- = 0": (0.0, Passes()),
    "one negative": (1.0, Passes(negatives_per_step=1)),
    "chunks of 8": (1.0, Passes(chunk_size=8)),
    "memory-flat, 8": (1.0, Passes(chunk_size=8, backward=Tensor.backward)),
    "memory-flat, 64": (1.0, Passes(chunk_size=64, backward=Tensor.backward)),
}
NAMES = (PUBLISHED, *ARRANGEMENTS)


def make(
    model: str,
    arrangement: str,
    num_candidates: int,
    *,
    batch: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """One training step, on inputs that are the same for every arrangement -> its loss."""
    torch.manual_seed(0)
    kind, folder = DENOISERS[model]
    net = kind.from_pretrained(MODELS / model, subfolder=folder, torch_dtype=dtype)
    denoiser = TokenDenoiser(net.to(device).requires_grad_(False))
    if compiled:
        net.compile()
    batch = max(4, num_candidates) if batch is None else batch
    side, channels = net.config.sample_size, net.config.in_channels
    width = net.config.joint_attention_dim if model == "flow" else net.config.cross_attention_dim
    noisy, target = torch.randn(2, batch, channels, side, side, device=device)
    times = torch.linspace(20, 980, batch, device=device)
    text = {"prompt_embeds": torch.randn(batch, TEXT, width, device=device)}
    if model == "flow":
        text["pooled_prompt_embeds"] = torch.randn(batch, width, device=device)
    generator = torch.Generator().manual_seed(0)
    candidates = InBatch(num_candidates - 1)(range(batch), generator=generator)
    ema = EMA(denoiser.tokens.parameters())
    optimizer = torch.optim.AdamW(denoiser.tokens.parameters(), lr=1e-3)
    if arrangement == PUBLISHED:

        def loss() -> Tensor:
            return published(denoiser, ema, noisy, times, target, text, candidates)

        update_ema = ema.update
    else:
        neg_scale, passes = ARRANGEMENTS[arrangement]
        agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=neg_scale), passes=passes, seed=0)

        def loss() -> Tensor:
            return agsm(noisy, times, target, text, candidates).loss

        update_ema = agsm.update_ema

    def run() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()
        optimizer.step()
        update_ema()
        return value.detach()

    return run


def published(
    denoiser: TokenDenoiser,
    ema: EMA,
    noisy: Tensor,
    times: Tensor,
    target: Tensor,
    text: dict[str, Tensor],
    candidates: Candidates,
) -> Tensor:
    """arXiv 2605.30038's step: a caption at a time, the whole batch, γ⁺ = γ⁻ = 1, T = 0.1."""

    def predict(column: int) -> Tensor:
        rows = candidates.index[:, column].to(noisy.device)
        captions = {name: value[rows] for name, value in text.items()}
        bank = Bank.POSITIVE if column == 0 else Bank.NEGATIVE
        return denoiser(noisy, times, captions, bank).float()

    columns = range(candidates.index.shape[1])
    with torch.no_grad(), ema.applied():
        ema_pred = torch.stack([predict(column) for column in columns], dim=1)
    pred = torch.stack([predict(column) for column in columns], dim=1)
    return plain(pred, ema_pred, target)


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds: of the processor on the CPU, by the clock on a GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def child(model: str, arrangement: str, num_candidates: int, settings: dict[str, Any]) -> float:
    """Peak growth in MiB of two steps, in this fresh process."""
    make(model, arrangement, 2, batch=2, **settings)()  # loads the kernels
    run = make(model, arrangement, num_candidates, **settings)
    on_cpu = settings["device"] == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = resident_mib("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    for _ in range(2):
        run()
    peak = resident_mib("VmHWM") if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    return peak - before


def peak_of(model: str, arrangement: str, num_candidates: int, options: list[str]) -> float:
    command = [sys.executable, __file__, *options, "--child", model, arrangement]
    # Freed blocks go back to the system at once: the peak is the tensors', not a reserve.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.check_output([*command, str(num_candidates)], env=settings)
    return float(printed.split()[-1])


def compare(model: str, num_candidates: int, args: argparse.Namespace) -> None:
    """Prints a line an arrangement."""
    settings = {
        "device": args.device,
        "dtype": getattr(torch, args.dtype),
        "compiled": args.compile,
    }
    steps = {name: make(model, name, num_candidates, **settings) for name in NAMES}
    for run in steps.values():
        for _ in range(2):  # loads or compiles the kernels
            run()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(args.rounds):
        for name, run in steps.items():
            times[name].append(timed(run, args.device))
    del steps, run
    options = ["--device", args.device, "--dtype", args.dtype, *["--compile"] * args.compile]
    memory = {name: peak_of(model, name, num_candidates, options) for name in NAMES}
    for name in NAMES:
        ratios = [a / b for a, b in zip(times[name], times[PUBLISHED], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        told = f"{middle:.2f} ({low:.2f}-{high:.2f})" if name != PUBLISHED else "1"
        print(
            f"{model:7} K = {num_candidates:2} {name:15} "
            f"{1e3 * statistics.median(times[name]):6.0f} ms  time {told:18} "
            f"peak {memory[name]:5.0f} MiB, {memory[name] / memory[PUBLISHED]:.2f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("-r", "--rounds", type=int, default=9, help="Turns to take the median over (default 9).")
    add("-m", "--models", nargs="+", default=list(DENOISERS), choices=DENOISERS,
        help="Denoisers to train tokens on (default both).")  # fmt: skip
    add("-k", "--candidates", nargs="+", type=int, default=[2, 4, 8, 16], metavar="K",
        help="Numbers of captions that compete for an image (default 2 4 8 16).")  # fmt: skip
    add("-d", "--device", default="cpu", choices=["cpu", "cuda"],
        help="Device to run all steps on (default cpu).")  # fmt: skip
    add("-t", "--dtype", default="float32", choices=["float32", "bfloat16"],
        help="Type of the denoiser's weights and activations (default float32).")  # fmt: skip
    add("-c", "--compile", action="store_true", help="Compile the denoiser by torch.compile.")
    add("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.child:
        model, arrangement, number = args.child
        settings = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        print(child(model, arrangement, int(number), settings | {"compiled": args.compile}))
        return
    where = "one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, {args.dtype}{', compiled' * args.compile}; {args.rounds} rounds in turns")
    for model in args.models:
        for num_candidates in args.candidates:
            compare(model, num_candidates, args)


if __name__ == "__main__":
    main()
