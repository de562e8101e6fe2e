"""InPO (Diffusion-DPO at inverted noise) on a pipeline, alone or with AGSM in its step.

    python recipes/train_inpo.py --rank 8 --agsm_weight 1000
    accelerate launch recipes/train_inpo.py --config recipes/configs/inpo_sdxl.yaml \
        --data pairs.parquet

For eps- and v-prediction: Stable Diffusion and SDXL. The rest is as in `train_dpo.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from common.options import option, parse
from common.settings import PreferenceOptions
from common.stop import command


@dataclass(frozen=True)
class Options(PreferenceOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    output_dir: str = "runs/inpo"
    model: str = "recipes/models/epsilon"
    inversion_steps: int = option(
        10, "Levels of the whole schedule that the inversion visits.", at_least=1
    )
    eta: float = option(0.1, "Noise of the inversion's steps, in units of DDIM's.", at_least=0)
    agsm_noise: Literal["inverted", "gaussian"] = option(
        "inverted",
        "Noise of the winners in AGSM: InPO's inverted one, whose prediction is reused, or "
        "Gaussian at timesteps of its own.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.hosts.base import AGSMBatch
    from agsm_loss.integrations.hosts.inpo import InPO
    from common.preference_training import Pairs, run_preference
    from world.task import open_task

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
