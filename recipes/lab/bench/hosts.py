"""Time and memory of a step of the hosts, alone and with AGSM in it.

    python -m recipes.lab.bench.hosts

A LoRA of rank 8 on the embedded world's UNet (lab/models/epsilon, 3.5 M parameters, 16 tokens of
text), with soft tokens where there is AGSM; forward, backward, optimizer and EMA on eight pairs.
All variants of a host take turns in one run: time is the median over rounds, against the host's own
of the same round; memory is what the peak resident set of a fresh process grows by in its first two
steps (Linux). DPO and InPO give AGSM their prediction on the winner; "winner again" runs it again.
SPO's rollout, which is the same with and without AGSM, is not timed.

Denoising is a trainer's own step, of all weights or a LoRA of rank 16, on 16 images, on either kind
of model. It gives AGSM at guidance scale 3, against the empty caption, its prediction ("pred") or
does not.

Flow-GRPO and DiffusionNFT: a LoRA on the embedded world's transformer (lab/models/flow), with
the rollout of 16 images in ten steps. Flow-GRPO trains on four of these steps at once, DiffusionNFT
on eight images at a time. With each backward pass comes AGSM on four images, the empty caption
competing, or plain denoising on them (AGSM with pos_scale 0, whose EMA runs too). Decoding and the
reward are not timed.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.utils.logging import disable_progress_bar
from peft import LoraConfig
from torch import Tensor

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank, InBatch, Passes
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.base import AGSMBatch, Host, adapters_off, take_rows
from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
from agsm_loss.integrations.hosts.diffusion_nft import DiffusionNFT
from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO
from agsm_loss.integrations.hosts.inpo import InPO
from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_latents, sample_sde
from agsm_loss.integrations.hosts.spo import SPO, StatePairs
from agsm_loss.integrations.noise import add_noise, regression_target
from agsm_loss.integrations.prompts import encode_prompts
from agsm_loss.integrations.tokens.pipelines import denoiser_of
from lab.bench.measure import growth, in_turns, peak, ratio
from run.log import quiet_libraries

BATCH = 8
MODELS = Path(__file__).parents[1] / "models"
LORA = LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


class Again(AGSMRegularizer):
    """AGSM that does not take the host's prediction."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{**kwargs, "pred": None})


# name -> what makes the regularizer; None: the host alone
VARIANTS: dict[str, Any] = {
    "alone": None,
    "K = 2": partial(AGSMRegularizer, candidates=InBatch(1)),
    "K = 4": AGSMRegularizer,
    "K = 4, winner again": Again,
    "K = 4, 8 samples a pass": partial(AGSMRegularizer, passes=Passes(chunk_size=8)),
}
PREFERENCE_HOSTS: dict[str, Callable[..., Host]] = {
    "DPO": DiffusionDPO,
    "InPO": partial(InPO, num_steps=4),
    "SPO": partial(SPO, guidance_scale=5.0),
}
# of Flow-GRPO and DiffusionNFT: name -> settings of the loss
REWARD_VARIANTS: dict[str, Any] = {
    "alone": None,
    "denoising": {"pos_scale": 0.0},
    "empty caption": {"temperature": 1e6},
}
# of a plain trainer: name -> whether it gives its prediction, and whether an EMA is the teacher
DENOISING_VARIANTS: dict[str, Any] = {
    "alone": None,
    "AGSM, pred": (True, False),
    "AGSM, pred, EMA": (True, True),
    "AGSM, no pred": (False, False),
}
DENOISING_HOSTS = {
    "denoising, flow": ("flow", False),
    "denoising, eps": ("epsilon", False),
    "LoRA, flow": ("flow", True),
    "LoRA, eps": ("epsilon", True),
}
HOSTS = (*DENOISING_HOSTS, *PREFERENCE_HOSTS, "Flow-GRPO", "DiffusionNFT")


def make(host: str, variant: str) -> Callable[[], float]:
    """One training step of the host, on inputs that are the same for every variant -> its loss."""
    if host in DENOISING_HOSTS:
        return make_denoising(*DENOISING_HOSTS[host], variant)
    if host not in PREFERENCE_HOSTS:
        return make_with_rollout(host, variant)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(
        MODELS / "epsilon", subfolder="unet"
    ).requires_grad_(False)
    unet.add_adapter(LORA)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    regularizer = VARIANTS[variant]
    denoiser: Any = TokenDenoiser(unet) if regularizer else PlainDenoiser(unet)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    agsm = None
    if regularizer:
        agsm = regularizer(denoiser, EMA(trained), AGSMLoss(neg_scale=0.1))
    step = PREFERENCE_HOSTS[host](
        denoiser, scheduler, reference=partial(adapters_off, unet), agsm=agsm
    )
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    winner, loser, noise, other = torch.randn(4, BATCH, unet.config.in_channels, side, side)
    times = torch.arange(1, 1 + BATCH) * 100
    text, empty = ({"prompt_embeds": torch.randn(BATCH, 16, width)} for _ in range(2))
    captions = list(range(BATCH))

    def run() -> float:
        if host == "DPO":
            out = step(winner, loser, text, times, noise, captions=captions)
        elif host == "InPO":
            out = step(winner, loser, text, 601, captions=captions)
        else:
            pairs = StatePairs(noise, winner, loser, times, times - 50, torch.arange(BATCH))
            own = AGSMBatch(other, times, noise, text, captions) if agsm else None
            out = step(pairs, text, empty, agsm_batch=own)
        return trained_on(out.loss, optimizer, step)

    return run


def trained_on(loss: Tensor, optimizer: torch.optim.Optimizer, owner: Any) -> float:
    """Backward, optimizer and the EMA of its owner, if any -> the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if owner is not None:
        owner.update_ema()
    return float(loss.detach())


def make_denoising(name: str, lora: bool, variant: str) -> Callable[[], float]:
    """A trainer's step by mean squared error, with or without AGSM -> its loss."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    model = denoiser_of(pipe).requires_grad_(not lora)
    if lora:
        model.add_adapter(LoraConfig(r=16, target_modules=LORA.target_modules))
    denoiser, scheduler = PlainDenoiser(model), pipe.scheduler
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    chosen, agsm = DENOISING_VARIANTS[variant], None
    if chosen is not None:
        ema = EMA(trained, decay=0.98) if chosen[1] else None
        agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(guidance_scale=3))
    captions = ["two red circles", "a blue square"] * BATCH
    settings = {"max_sequence_length": 1}  # of the flow model's silent T5
    text, null = (encode_prompts(pipe, one, **settings) for one in (captions, [""]))
    side = model.config.sample_size
    latents, noise = torch.randn(2, 2 * BATCH, model.config.in_channels, side, side)
    times = torch.arange(1, 1 + 2 * BATCH) * 55
    noisy = add_noise(scheduler, latents, noise, times)
    target = regression_target(scheduler, latents, noise, times)

    def run() -> float:
        pred = denoiser(noisy, times, text, Bank.POSITIVE)
        loss = torch.nn.functional.mse_loss(pred, target)
        if agsm is not None:
            given = {"pred": pred} if chosen[0] else {}
            loss = loss + agsm(noisy, times, target, text, captions, null=null, **given).loss
        return trained_on(loss, optimizer, agsm)

    return run


def make_with_rollout(host: str, variant: str) -> Callable[[], float]:
    """A rollout by the host's sampler and the training on it -> the last pass's loss."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel.from_pretrained(MODELS / "flow", subfolder="transformer")
    model.requires_grad_(False).add_adapter(LORA)
    denoiser, scheduler = PlainDenoiser(model), FlowMatchEulerDiscreteScheduler()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    settings, agsm = REWARD_VARIANTS[variant], None
    if settings is not None:
        loss = AGSMLoss(neg_scale=0, **settings)
        agsm = AGSMRegularizer(denoiser, EMA(trained), loss)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images, shown = 2 * BATCH, BATCH // 2
    size = model.config
    noise = torch.randn(images, size.in_channels, size.sample_size, size.sample_size)
    text = {
        "prompt_embeds": torch.randn(images + 1, 16, size.joint_attention_dim),
        "pooled_prompt_embeds": torch.randn(images + 1, size.pooled_projection_dim),
    }
    prompts = {name: rows[:images] for name, rows in text.items()}
    pool, empty = ({name: x[part] for name, x in text.items()} for part in (slice(shown), [images]))
    times = torch.arange(1, 1 + images) * 55.0
    captions = list(range(shown))
    data = AGSMBatch(noise[:shown], times[:shown], noise[-shown:], pool, captions, null=empty)
    given = {"agsm_batch": data if agsm else None}

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        pred: Tensor = denoiser(x, timesteps, prompts, Bank.POSITIVE)
        return pred

    if host == "Flow-GRPO":
        step: Any = FlowGRPO(denoiser, scheduler, agsm=agsm)

        def run() -> float:
            trajectory = sample_sde(denoise, scheduler, noise)
            advantages = group_advantages(trajectory.last.mean((1, 2, 3)), BATCH)
            out = step(trajectory, advantages, prompts, torch.arange(4), **given)
            return trained_on(out.loss, optimizer, step)

    else:
        reference = partial(adapters_off, model)
        step = DiffusionNFT(
            denoiser, scheduler, old=EMA(trained), reference=reference, steps_per_epoch=2, agsm=agsm
        )

        def run() -> float:
            with step.old.applied():
                latents = sample_latents(denoise, scheduler, noise)
            advantages = group_advantages(latents.mean((1, 2, 3)), BATCH)
            for rows in torch.arange(images).chunk(2):
                part = latents[rows], advantages[rows], take_rows(prompts, rows)
                out = step(*part, times[rows], noise[rows], **given)
                last = trained_on(out.loss, optimizer, step)
            return last

    return run


def variants_of(host: str) -> list[str]:
    """SPO has no prediction that AGSM could take."""
    if host in DENOISING_HOSTS:
        return list(DENOISING_VARIANTS)
    if host not in PREFERENCE_HOSTS:
        return list(REWARD_VARIANTS)
    return [name for name in VARIANTS if host != "SPO" or "again" not in name]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=HOSTS)
    parser.add_argument("--child", nargs=2, metavar=("HOST", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet_libraries()
    disable_progress_bar()
    if args.child:
        print(growth(make(*args.child), 2))
        return
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds in turns; (quartiles)")
    for host in args.hosts:
        names = variants_of(host)
        steps = {name: make(host, name) for name in names}
        for run in steps.values():
            run()
        times = in_turns(steps, args.rounds)
        del steps
        memory = {name: peak("hosts", "--child", host, name) for name in names}
        for name in names:
            told = ratio(times[name], times["alone"]) if name != "alone" else "1"
            print(
                f"{host:15} {name:24} {statistics.median(times[name]):6.2f} s  time {told:18} "
                f"peak +{memory[name]:5.0f} MiB, {memory[name] / memory['alone']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
