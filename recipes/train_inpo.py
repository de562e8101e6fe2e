"""InPO (Diffusion-DPO at inverted noise) on a text-to-image pipeline, alone or with AGSM in its step.

    python recipes/train_inpo.py --lora-rank 8 --agsm-weight 1000
    accelerate launch recipes/train_inpo.py --config recipes/configs/inpo_sdxl.yaml --data pairs.parquet

For eps- and v-prediction: Stable Diffusion and SDXL. The rest is as in `train_dpo.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.options import option, parse
from common.preference import Pairs, PreferenceOptions, run_preference


@dataclass(frozen=True)
class Options(PreferenceOptions):
    """Every option, its default and its meaning."""

    output: str = option("runs/inpo", "folder for what is trained, log, sheets and checkpoints")
    model: str = option("recipes/models/epsilon", "pipeline folder or hub id")
    inversion_steps: int = option(10, "levels of the whole schedule that the inversion visits")
    eta: float = option(0.1, "noise of the inversion, in DDIM's sigma")
    agsm_noise: str = option(
        "inverted",
        "of the winners in AGSM: the host's, whose prediction is reused, or one of its own, at timesteps "
        "of their own",
        ("inverted", "gaussian"),
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.hosts.inpo import InPO
    from agsm_loss.integrations.hosts.step import AGSMBatch
    from world.task import open_task

    def make_step(student: Any, agsm: Any, settings: Any) -> InPO:
        scheduler = student.model.pipe.scheduler
        return InPO(
            student.denoiser,
            scheduler,
            reference=student.reference,
            num_steps=options.inversion_steps,
            eta=options.eta,
            agsm=agsm,
            **settings,
        )

    def run(step: Any, student: Any, pairs: Pairs, **extra: Any) -> Any:
        winner, loser, text, draw, own = pairs
        step.generator = draw
        if step.agsm is not None and options.agsm_noise == "gaussian":
            times = student.timesteps(len(winner), own)
            noise = torch.randn(winner.shape, generator=own).to(winner)
            extra["agsm_batch"] = AGSMBatch(winner, times, noise, text, **extra)
            del extra["captions"]
        timestep = int(student.timesteps(1, draw)[0])  # one for the batch, as published
        return step(winner, loser, text, timestep, **extra)

    run_preference(options, open_task, make_step, run)


if __name__ == "__main__":
    main()
