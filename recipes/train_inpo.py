r"""InPO (Diffusion-DPO at inverted noise) on a pipeline, alone or with AGSM in its step.

    python recipes/train_inpo.py --rank 8 --num_tokens 0 --agsm_weight 1000
    accelerate launch recipes/train_inpo.py --config recipes/configs/inpo_sdxl.yaml \
        --data pairs.parquet

`--model` is an eps- or v-prediction pipeline: Stable Diffusion or SDXL. `--rank N` trains a LoRA,
`--full` all weights, `--num_tokens N` soft tokens as well. `--data` is the embedded world, or a
table with Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption) or image_w, image_l, caption. AGSM
trains on the winners at Gaussian noise; at InPO's inverted noise (`--agsm_noise inverted`) it did
harm.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from run.options import option, parse
from run.settings import PreferenceOptions
from run.stop import command


@dataclass(frozen=True)
class Options(PreferenceOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "InPO"
    output_dir: str = "runs/inpo"
    WORLD_MODEL = "recipes/lab/models/epsilon"
    inversion_steps: int = option(
        10, "Timesteps, spread over the schedule, that the inversion visits.", at_least=1
    )
    eta: float = option(0.1, "Noise of the inversion's steps, in units of DDIM's.", at_least=0)
    agsm_noise: Literal["gaussian", "inverted"] = option(
        "gaussian",
        "Noise of the winners in AGSM: Gaussian, at timesteps of its own, or InPO's inverted "
        "noise, whose prediction is reused (less time; it did harm in our study).",
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.hosts.base import AGSMBatch
    from agsm_loss.integrations.hosts.inpo import InPO
    from data.task import open_task
    from model.preference_training import Pairs, run_preference

    def make_step(trained: Any, agsm: Any, settings: Any) -> InPO:
        scheduler = trained.model.pipe.scheduler
        return InPO(
            trained.denoiser,
            scheduler,
            reference=trained.reference,
            num_steps=options.inversion_steps,
            eta=options.eta,
            agsm=agsm,
            **settings,
        )

    def run(step: Any, trained: Any, pairs: Pairs, **extra: Any) -> Any:
        winner, loser, text, draw, own = pairs
        step.generator = draw
        if step.agsm is not None and options.agsm_noise == "gaussian":
            times = trained.timesteps(len(winner), own)
            noise = torch.randn(winner.shape, generator=own).to(winner)
            extra["agsm_batch"] = AGSMBatch(winner, times, noise, text, **extra)
            del extra["captions"]
        timestep = int(trained.timesteps(1, draw)[0])  # one for the batch, as published
        return step(winner, loser, text, timestep, **extra)

    run_preference(options, open_task, make_step, run)


if __name__ == "__main__":
    command(main)
