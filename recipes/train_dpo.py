"""Diffusion-DPO on a text-to-image pipeline, alone or with AGSM in its step.

    python recipes/train_dpo.py --lora-rank 8 --agsm-weight 1000
    accelerate launch recipes/train_dpo.py --config recipes/configs/dpo_sdxl.yaml --data pairs.parquet

`--model`: Stable Diffusion, SDXL, SD3 or Flux.1; `--lora-rank` or `--full`, with soft tokens beside
(`--num-tokens 0` for none). `--data`: the embedded world, or a table with Pick-a-Pic's columns or
image_w, image_l, caption. The negatives of AGSM are the batch's other captions, edited ones, or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.options import option, parse
from common.preference import Pairs, PreferenceOptions, run_preference


@dataclass(frozen=True)
class Options(PreferenceOptions):
    """Every option, its default and its meaning."""

    output: str = option("runs/dpo", "folder for what is trained, log, sheets and checkpoints")


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
    from world.task import open_task

    def make_step(student: Any, agsm: Any, settings: Any) -> DiffusionDPO:
        scheduler = student.model.pipe.scheduler
        return DiffusionDPO(
            student.denoiser, scheduler, reference=student.reference, agsm=agsm, **settings
        )

    def run(step: Any, student: Any, pairs: Pairs, **extra: Any) -> Any:
        winner, loser, text, draw, _ = pairs
        noise = torch.randn(winner.shape, generator=draw).to(winner)
        return step(winner, loser, text, student.timesteps(len(winner), draw), noise, **extra)

    run_preference(options, open_task, make_step, run)


if __name__ == "__main__":
    main()
