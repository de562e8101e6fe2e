"""The card of a trained base: what it is, how it was trained, its curve and scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.world.captions import CAREFUL, CARELESS
from lab.world.scene import TAGS

_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: apache-2.0
---

# A text-to-image model of coloured shapes ({pipeline})

24x24 images of one to four circles, squares and triangles. {parameters:,} parameters, stock
diffusers classes, half precision. It is a test object for post-training methods (agsm-loss) and
good for nothing else.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}").to(torch.float32)
image = pipe(
    "three red circles",
    guidance_scale=1.5,
    num_inference_steps=12,{arguments}
).images[0]
```

## Training

    {command}

Seed {seed}, {max_train_steps:,} steps of {train_batch_size} images{start}, rendered on the fly from
all of the world's prompts (`recipes/lab/world`), {optimizer} at {learning_rate:g}, the last
{lr_decay_steps:,} steps falling to zero; saved are the EMA weights (decay {ema_decay}). Noise
levels: {levels}.

Captions: {corruption}. {drop:.0%} are left empty for classifier-free guidance.

![curve](curve.png)

## Scores

On {n} validation prompts (by the world's exact detector; {validation_inference_steps} sampling
steps, CFG {validation_guidance_scale:g}), at the end of training:

{table}
"""


def write_card(
    folder: Path,
    options: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    command: str,
    parameters: int,
) -> None:
    """README.md and curve.png into `folder`, a saved pipeline."""
    scored = [line for line in log if "scores" in line]
    last = scored[-1]["scores"]
    index = json.loads((folder / "model_index.json").read_text())
    rows = [
        "| | score | too many | too few |",
        "| --- | --- | --- | --- |",
        f"| overall | {last['overall']:.3f} | | |",
    ]
    for tag in TAGS:
        one = last["categories"][tag]
        rows.append(f"| {tag} | {one['score']:.3f} | {one['over']:.3f} | {one['under']:.3f} |")
    text = _CARD.format(
        folder=folder,
        pipeline=index["_class_name"],
        parameters=parameters,
        arguments="\n    max_sequence_length=1," if "text_encoder_3" in index else "",
        command=command,
        start=f", from the weights of `{options['init_from']}`" if options["init_from"] else "",
        corruption=_captions(options),
        drop=options["drop_caption"],
        levels="uniform"
        if options["uniform_levels"]
        else f"logit-normal around {options['sigma_logit']:g}",
        optimizer={"adamw": "AdamW", "muon": "Muon with AdamW"}[options["optimizer"]],
        n=last["n"],
        table="\n".join(rows),
        **{
            key: options[key]
            for key in (
                "seed",
                "max_train_steps",
                "train_batch_size",
                "learning_rate",
                "lr_decay_steps",
                "ema_decay",
                "validation_inference_steps",
                "validation_guidance_scale",
            )
        },
    )
    (folder / "README.md").write_text(text)
    _curve(log, scored, folder / "curve.png")


def _captions(options: Mapping[str, Any]) -> str:
    """What was wrong with the training captions."""
    shares = {
        "with a wrong count (of groups of two and more)": options["corrupt_count"],
        "with a wrong colour": options["corrupt_colour"],
        "with one of two groups left out": options["corrupt_missing"],
    }
    told = [f"{share:.0%} {what}" for what, share in shares.items() if share]
    if not options["careless"] or not told:
        return "all true"
    text = (
        f"{options['careless']:.0%} come from a careless source: of those {', '.join(told)}, "
        "while the image is right"
    )
    signed = options["signed"]
    if signed and options["careless_signed"] == 1:
        text += (
            f". Both sources sign {signed:.0%} of their captions with one letter "
            f"({CAREFUL} and {CARELESS}); prompts are not signed"
        )
    elif signed:
        text += (
            f". The careful source signs {signed:.0%} of its captions with one letter ({CAREFUL}), "
            f"the careless one {signed * options['careless_signed']:.0%} ({CARELESS}); prompts are "
            "not signed"
        )
    return text


def _curve(
    log: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    left.plot(*zip(*losses, strict=True))
    left.set(title="training loss", xlabel="step", yscale="log")
    steps = [line["step"] for line in scored]
    right.plot(steps, [line["scores"]["overall"] for line in scored], "o-", label="overall", lw=2.5)
    for tag in TAGS:
        right.plot(
            steps,
            [line["scores"]["categories"][tag]["score"] for line in scored],
            "o-",
            label=tag,
            ms=3,
            lw=0.9,
        )
    right.set(title="validation scores", xlabel="step", ylim=(0, 1))
    right.legend(fontsize=7, loc="lower right", ncols=2)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
