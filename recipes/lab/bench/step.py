"""What a training step costs: the ways of `AGSMRegularizer` against the published arrangement.

    python -m recipes.lab.bench.step
    python -m recipes.lab.bench.step --models sd15 --candidates 2 --device cuda --dtype bfloat16

Soft tokens are trained on the world's denoisers: "flow", a small SD3, and "epsilon", a small UNet,
with 16 tokens of text a caption; or on sd15, sdxl, sd3 and flux in their published sizes, with
random weights, at their own resolution and length of text. A batch has max(4, K) images. A step is
all from the denoiser's passes to the optimizer and the EMA.

The published arrangement, restated in our own words, makes one EMA pass and one student pass over
all images under all K captions. The others are AGSMRegularizer's:

    exact            all captions in one pass
    gamma- = 0       exact, and the negatives are not trained
    one negative     one random negative an image is trained: negatives_per_step=1
    chunks of 8      8 samples a pass, run again in the backward pass: chunk_size=8
    memory-flat, 8   8 samples a pass, each run backward at once: chunk_size=8, backward=...
    memory-flat, 64  the same with 64 samples

All but "gamma- = 0" and "one negative" have the published loss and gradients. They take turns, and
time is a ratio to the published step of the same turn: the median over turns, with quartiles. On
the CPU one thread is used, and time is processor time, in which waiting for other programs does not
count. Memory is the peak of two steps over what was there before: on the CPU the resident set of a
process of its own (Linux), on a GPU what torch has allocated. nan: the step, or the published one
that it is compared with, did not fit the GPU.
"""

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank, Candidates, InBatch, Passes
from agsm_loss.integrations.denoisers import TokenDenoiser
from lab.bench.loss import plain
from lab.bench.measure import growth, in_turns, peak, ratio
from memory import OPTIONS, configs, inputs_of
from memory import make as on_meta

MODELS = Path(__file__).parents[1] / "models"
TEXT = 16  # tokens
DENOISERS: dict[str, Any] = {
    "flow": (SD3Transformer2DModel, "transformer"),
    "epsilon": (UNet2DConditionModel, "unet"),
}
RELEASED = ("sd15", "sdxl", "sd3", "flux")  # of configs/memory/
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
    net, inputs = network(model, device, dtype)
    torch.manual_seed(0)
    # Its own modules, which tokens are attached to, around the same weights.
    net = copy.deepcopy(net, {id(p): p for p in (*net.parameters(), *net.buffers())})
    denoiser = TokenDenoiser(net)
    if compiled:
        net.compile()
    batch = max(4, num_candidates) if batch is None else batch
    noisy, _, text, image = tree_map(
        lambda one: torch.randn(one.shape, device=device), inputs(batch)
    )
    target = torch.randn_like(noisy)
    times = torch.linspace(20, 980, batch, device=device)
    generator = torch.Generator().manual_seed(0)
    candidates = InBatch(num_candidates - 1)(range(batch), generator=generator)
    ema = EMA(denoiser.tokens.parameters())
    optimizer = torch.optim.AdamW(denoiser.tokens.parameters(), lr=1e-3)
    if arrangement == PUBLISHED:

        def loss() -> Tensor:
            return published(denoiser, ema, noisy, times, target, text, candidates, image)

        update_ema = ema.update
    else:
        neg_scale, passes = ARRANGEMENTS[arrangement]
        agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=neg_scale), passes=passes, seed=0)

        def loss() -> Tensor:
            given = noisy, times, target, text, candidates
            return agsm(*given, image_conditioning=image).loss

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


@lru_cache(maxsize=1)
def network(model: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Any]]:
    """The denoiser, frozen, and what makes its inputs' shapes.

    The latter takes a number of samples and returns latents, timesteps, text and image conditioning
    without data (meta device).
    """
    torch.manual_seed(0)
    if model in DENOISERS:
        kind, folder = DENOISERS[model]
        net = kind.from_pretrained(MODELS / model, subfolder=folder, torch_dtype=dtype)
        return net.to(device).requires_grad_(False), partial(world_inputs, net.config)
    about = configs(model)
    pipeline = about.pop("_class_name")
    name, config = about.get("unet") or about["transformer"]
    with torch.device(device):
        net = getattr(diffusers, name).from_config(config).to(dtype).requires_grad_(False)
    return net, inputs_of(OPTIONS.make(), pipeline, net, on_meta(*about["vae"]))


def world_inputs(config: Any, number: int) -> Any:
    """`inputs_of` for the world's models."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(number, *shape, device="meta")

    width = config.get("joint_attention_dim") or config.cross_attention_dim
    pooled = config.get("pooled_projection_dim")
    text = {"prompt_embeds": empty(TEXT, width)}
    text |= {"pooled_prompt_embeds": empty(pooled)} if pooled else {}
    return empty(config.in_channels, config.sample_size, config.sample_size), empty(), text, {}


def published(
    denoiser: TokenDenoiser,
    ema: EMA,
    noisy: Tensor,
    times: Tensor,
    target: Tensor,
    text: dict[str, Tensor],
    candidates: Candidates,
    image: dict[str, Tensor],
) -> Tensor:
    """arXiv 2605.30038's step: all captions in one pass, γ⁺ = γ⁻ = 1, T = 0.1."""
    batch, number = candidates.index.shape
    images = torch.arange(batch).repeat_interleave(number).to(noisy.device)
    rows = candidates.index.flatten().to(noisy.device)
    captions = {name: value[rows] for name, value in text.items()}
    bank = torch.tensor([Bank.POSITIVE, *[Bank.NEGATIVE] * (number - 1)]).repeat(batch)
    shown = {name: value[images] for name, value in image.items()}

    def predict() -> Tensor:
        pred = denoiser(noisy[images], times[images], captions, bank, **shown).float()
        return pred.unflatten(0, (batch, number))

    with torch.no_grad(), ema.applied():
        ema_pred = predict()
    return plain(predict(), ema_pred, target)


def gpu_clock() -> float:
    """Seconds, when the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def child(model: str, arrangement: str, num_candidates: int, settings: dict[str, Any]) -> float:
    """Peak growth in MiB of two steps, in this fresh process."""
    make(model, arrangement, 2, batch=2, **settings)()  # loads the kernels
    return growth(make(model, arrangement, num_candidates, **settings), 2)


def peak_on_cpu(model: str, arrangement: str, num_candidates: int, options: list[str]) -> float:
    """Of two steps, from `child`."""
    return peak("step", *options, "--child", model, arrangement, str(num_candidates))


def peak_on_gpu(run: Callable[[], object]) -> float:
    """Peak growth in MiB of two steps."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(model: str, num_candidates: int, args: argparse.Namespace) -> None:
    """Prints a line an arrangement."""
    settings = {
        "device": args.device,
        "dtype": getattr(torch, args.dtype),
        "compiled": args.compile,
    }
    options = ["--dtype", args.dtype, *["--compile"] * args.compile]

    def ready(name: str) -> tuple[Callable[[], Tensor], float]:
        """The step, which has loaded or compiled its kernels, and its peak."""
        run = make(model, name, num_candidates, **settings)
        for _ in range(2):
            run()
        if args.device == "cpu":
            return run, peak_on_cpu(model, name, num_candidates, options)
        return run, peak_on_gpu(run)

    steps, memory = {}, dict.fromkeys(NAMES, math.nan)
    for name in NAMES:
        with suppress(torch.OutOfMemoryError):
            steps[name], memory[name] = ready(name)
        gc.collect()  # what did not fit
        torch.cuda.empty_cache()
    clock = time.process_time if args.device == "cpu" else gpu_clock
    failed = {name: [math.nan] * args.rounds for name in NAMES}
    times = failed | in_turns(steps, args.rounds, clock)
    for name in NAMES:
        told = ratio(times[name], times[PUBLISHED]) if name != PUBLISHED else "1"
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
    add("-m", "--models", nargs="+", default=list(DENOISERS), choices=[*DENOISERS, *RELEASED],
        help="Denoisers to train tokens on (default the world's).")  # fmt: skip
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
        settings = {"dtype": getattr(torch, args.dtype), "compiled": args.compile}
        print(child(model, arrangement, int(number), settings))
        return
    where = "one thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, {args.dtype}{', compiled' * args.compile}; {args.rounds} rounds in turns")
    for model in args.models:
        for num_candidates in args.candidates:
            compare(model, num_candidates, args)


if __name__ == "__main__":
    main()
