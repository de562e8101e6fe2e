"""What guidance away from wrong captions does to a model's pictures, with no training at all.

    python recipes/probe_guidance.py --model recipes/models/flow --against neighbours

AGSM's positive target points from the wrong captions' predictions to the right one's,
tau + gamma+ (f(c) - sum_k w_k f(c_k)), so what it teaches is guidance. Here the sampler does that
itself, f(c) + s (f(c) - mean_k f(c_k)), at several scales s, on the world's prompts; with
`--guidance_scale` over and above classifier-free guidance. A direction that does not help here is
unlikely to help as a target. Prints a table and writes it with `--output`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.options import Checked, option, parse
from common.stop import command


@dataclass(frozen=True)
class Options(Checked):
    """Every option, its default and its meaning."""

    model: str = option("recipes/models/flow", "Pipeline to sample: a folder.")
    against: Literal["null", "in_batch", "hard", "swapped", "counts", "neighbours"] = option(
        "counts",
        "Wrong captions: the empty one (classifier-free guidance, s = CFG - 1), another prompt's, "
        "one of the hard negatives, the two objects' colours exchanged or their relation reversed "
        "(swapped; a hard negative where there is neither), one more and one fewer object "
        "(counts), or the same without a single object (neighbours).",
    )
    guidance_scale: float = option(
        1.0, "Classifier-free guidance scale under it; 1: none.", at_least=1
    )
    scales: str = option("0,0.5,1,2", "Scales s of the guidance, separated by commas.")
    categories: str = option("counting", "Categories of the world, separated by commas, or all.")
    fold: Literal["train", "validation", "heldout"] = option(
        "validation", "Fold of the world's prompts."
    )
    per_category: int = option(96, "Prompts per category.", at_least=1)
    num_inference_steps: int = option(12, "Sampling steps per image.", at_least=1)
    seed: int = option(0, "Seed of the noise and of the wrong captions drawn.", at_least=0)
    batch_size: int = option(64, "Images per batch.", at_least=1)
    output: str = option("", "File for the table, in addition to printing it.")


def main(arguments: list[str] | None = None) -> None:
    """Prints the table of one model and one kind of wrong caption."""
    options = parse(Options, __doc__, arguments)

    from studies.guided_sampling import run

    table = run(options)
    if options.output:
        Path(options.output).write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    command(main)
