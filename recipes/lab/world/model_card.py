"""The card of a trained base: what it is, how it was trained, its curve and scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from agsm_loss.integrations.cards import save_card
from lab.world.captions import CAREFUL, CARELESS
from lab.world.scene import TAGS

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon with AdamW"}
_CARD = """
# A text-to-image model of coloured shapes ({{ pipeline }})

24x24 images of one to four circles, squares and triangles.
{{ "{:,}".format(parameters) }} parameters, stock diffusers classes, half precision.
It is a test object for post-training methods (agsm-loss) and good for nothing else.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({{ quoted(folder) }}).to(torch.float32)
image = pipe(
    "three red circles",
    guidance_scale=1.5,
    num_inference_steps=12,
{%- if three_encoders %}
    max_sequence_length=1,
{%- endif %}
).images[0]
```

## Training

    {{ command }}

Seed {{ seed }}, {{ "{:,}".format(max_train_steps) }} steps of {{ train_batch_size }} images
{%- if init_from %}, from the weights of `{{ init_from }}`{% endif %},
rendered on the fly from all of the world's prompts (`recipes/lab/world`),
{{ optimizer }} at {{ "%g" % learning_rate }}, the last {{ "{:,}".format(lr_decay_steps) }} steps
falling to zero; saved are the EMA weights (decay {{ ema_decay }}). Noise levels:
{% if uniform_levels %}uniform{% else %}logit-normal around {{ "%g" % sigma_logit }}{% endif %}.

Captions: {{ captions }}. {{ "%.0f" % (100 * drop_caption) }}% are left empty for classifier-free
guidance.

![curve](curve.png)

## Scores

On {{ scores.n }} validation prompts (by the world's exact detector;
{{ validation_inference_steps }} sampling steps, CFG {{ "%g" % validation_guidance_scale }}),
at the end of training:

| | score | too many | too few |
| --- | --- | --- | --- |
| overall | {{ "%.3f" % scores.overall }} | | |
{%- for tag in tags %}{% set one = scores.categories[tag] %}
| {{ tag }} | {{ "%.3f" % one.score }} | {{ "%.3f" % one.over }} | {{ "%.3f" % one.under }} |
{%- endfor %}
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
    index = json.loads((folder / "model_index.json").read_text())
    metadata = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", license="apache-2.0"
    )
    save_card(
        folder,
        metadata,
        _CARD,
        **{**options, "optimizer": _OPTIMIZERS[options["optimizer"]]},
        folder=folder,
        pipeline=index["_class_name"],
        three_encoders="text_encoder_3" in index,
        parameters=parameters,
        command=command,
        captions=_captions(options),
        scores=scored[-1]["scores"],
        tags=TAGS,
    )
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
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
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
