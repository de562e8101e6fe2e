r"""Diffusion-DPO on a text-to-image pipeline, alone or with AGSM in its step.

    python recipes/train_dpo.py --rank 8 --num_tokens 0 --agsm_weight 1000
    accelerate launch recipes/train_dpo.py --config recipes/configs/dpo_sdxl.yaml \
        --data pairs.parquet

`--model` is a Stable Diffusion, SDXL, SD3, Flux.1, Qwen-Image or Sana pipeline. `--rank N` trains a
LoRA, `--full` all weights, `--num_tokens N` soft tokens as well. `--data` is the embedded world, or
a table with Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption) or image_w, image_l, caption.
AGSM's negatives are the batch's other captions, edited ones, or both.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from run.options import parse
from run.settings import PreferenceOptions
from run.stop import command


@dataclass(frozen=True)
class Options(PreferenceOptions):
    """Those of `PreferenceOptions`."""

    TITLE = "Diffusion-DPO"
    output_dir: str = "runs/dpo"


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
    from data.task import open_task
    from model.preference_training import Pairs, run_preference

    def make_step(trained: Any, agsm: Any, settings: Any) -> DiffusionDPO:
        scheduler = trained.model.pipe.scheduler
        return DiffusionDPO(
            trained.denoiser, scheduler, reference=trained.reference, agsm=agsm, **settings
        )

    def run(step: Any, trained: Any, pairs: Pairs, **extra: Any) -> Any:
        winner, loser, text, draw, _ = pairs
        noise = torch.randn(winner.shape, generator=draw).to(winner)
        return step(winner, loser, text, trained.timesteps(len(winner), draw), noise, **extra)

    run_preference(options, open_task, make_step, run)


if __name__ == "__main__":
    command(main)
