"""The card beside what a recipe has trained: what it is, how it was made, its scores, its code.

    write_cards({"tokens": folder, "lora": other}, Trained(options, method, pipe, ...))

A card is README.md with the hub's metadata, and sheet.png where validation images were made. Its
code runs as it stands from where the recipe was run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from agsm_loss.integrations.cards import save_card
from data.sources import is_hub_id
from model.agsm import unread
from model.families import guidance
from run.checkpoints import MAY_CHANGE
from run.cli import command_of
from run.log import USED, lines_of

_NAMES = {"tokens": "Soft tokens", "lora": "A LoRA", "pipeline": "A pipeline"}
_ALWAYS = ("learning_rate", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
           "num_epochs", "seed", "mixed_precision", "data")  # fmt: skip
_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CARD = """
# {{ name }}, trained by {{ method }}

{{ name }} for `{{ line(options.model) }}` ({{ pipeline }}):
{{ "{:,}".format(parameters) }} parameters were trained
{%- if others %}, together with {{ others }}{% endif %}.

```python
import torch
from diffusers import DiffusionPipeline
{%- if saved.tokens %}

from agsm_loss.integrations.tokens.pipelines import (
    Sampling,
    load_soft_tokens,
    set_sampling,
)
{%- endif %}

pipe = DiffusionPipeline.from_pretrained({{ quoted(saved.pipeline or options.model) }})
dtype = torch.{{ dtype }}
pipe.to("cuda" if torch.cuda.is_available() else "cpu", dtype)
{%- if options.merge_lora and not saved.pipeline %}
pipe.load_lora_weights({{ quoted(options.merge_lora) }})  # training began with it
pipe.fuse_lora()
pipe.unload_lora_weights()
{%- endif %}
{%- if saved.lora %}
pipe.load_lora_weights({{ quoted(saved.lora) }})
{%- endif %}
{%- if saved.tokens %}
attached = load_soft_tokens(pipe, {{ quoted(saved.tokens) }})
{%- endif %}
image = pipe(
    prompt={{ quoted(prompt) }},
{%- for name, value in call.items() %}
    {{ name }}={{ value }},
{%- endfor %}
).images[0]
{%- if saved.tokens %}

set_sampling(pipe, attached, Sampling.OFF)  # no tokens; other uses under guidance: see Sampling
attached.detach()  # the pipeline without them
{%- endif %}
```
{% if kohya %}
The same for tools that read kohya's names, such as ComfyUI and A1111:

```python
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

lora = load_file({{ quoted(saved.lora / "pytorch_lora_weights.safetensors") }})
save_file(convert_state_dict_to_kohya(lora), {{ quoted(saved.lora ~ "_kohya.safetensors") }})
```
{% endif %}{% if sheet %}
Validation prompts after training:

![sheet](sheet.png)
{% endif %}
## Training

    {{ command }}

Of {{ processes }} process(es); options that are not at their defaults, and the usual ones:

| option | value |
| --- | --- |
{%- for name, value in told.items() %}
| {{ name }} | `{{ cell(value) }}` |
{%- endfor %}

## At the end
{% if scored %}
Shares of right images on {{ scored[-1].scores.n }} validation prompts.

| validation |{% for one in scored %} step {{ one.step }} |{% endfor %}
| --- |{{ " --- |" * scored|length }}
| overall |{% for one in scored %} {{ "%.3f" % one.scores.overall }} |{% endfor %}
{%- for tag in scored[-1].scores.categories %}
| {{ tag }} |{% for one in scored %} {{ "%.3f" % one.scores.categories[tag].score }} |{% endfor %}
{%- endfor %}
{% endif %}
| metric | value |
| --- | --- |
{%- for name, value in metrics.items() %}
| {{ name }} | `{{ "%.4g" % value }}` |
{%- endfor %}
"""


@dataclass(frozen=True)
class Trained:
    """What the cards tell of.

    method: what trained it. pipe: the pipeline. parameters: number of those trained.
    processes: of the run. prompt: of the example. arguments: what the pipeline is called with.
    """

    options: Any
    method: str
    pipe: Any
    parameters: int
    processes: int
    prompt: str
    arguments: Mapping[str, Any]


def write_cards(saved: Mapping[str, Path], run: Trained) -> None:
    """A card into each folder of saved: "tokens", "lora", "pipeline" -> folder."""
    options, output = run.options, Path(run.options.output_dir)
    sheets = sorted((output / "sheets").glob("[0-9]*.png"))
    log = [json.loads(one) for one in lines_of(output / "log.jsonl")]
    scored = [one for one in log if one.get("scores")]
    call = {
        "num_inference_steps": options.validation_inference_steps,
        **guidance(run.pipe, options.validation_guidance_scale),
        **run.arguments,
    }
    values = {
        **vars(run),
        "saved": saved,
        "pipeline": type(run.pipe).__name__,
        "dtype": _DTYPES[options.mixed_precision],
        "call": {name: repr(value) for name, value in call.items()},
        "sheet": bool(sheets),
        "command": command_of(options),
        "told": _options(options),
        "scored": scored[:1] + scored[1:][-1:],
        "metrics": {name: value for one in log for name, value in one.items()
                    if isinstance(value, float) and name not in USED},
    }  # fmt: skip
    for kind, folder in saved.items():
        others = " and ".join(f"`{one}`" for name, one in saved.items() if name != kind)
        kohya = kind == "lora" and hasattr(run.pipe, "unet")
        if sheets:
            shutil.copyfile(sheets[-1], folder / "sheet.png")
        own = {"name": _NAMES[kind], "others": others, "kohya": kohya}
        save_card(folder, _metadata(kind, run), _CARD, **values, **own)


def _metadata(kind: str, run: Trained) -> ModelCardData:
    options = run.options
    adapter = {"base_model_relation": "adapter"} if kind != "pipeline" else {}
    return ModelCardData(
        library_name="agsm-loss" if kind == "tokens" else "diffusers",
        pipeline_tag="text-to-image",
        tags=[
            *(["agsm"] if "AGSM" in run.method else []),
            *("text-to-image", {"tokens": "soft-tokens"}.get(kind, kind)),
        ],
        # The hub takes its own ids alone; a local folder is named in the text.
        **({"base_model": options.model, **adapter} if _on_hub(options.model) else {}),
        **({"datasets": [options.data]} if _on_hub(options.data) else {}),
    )


def _on_hub(name: str) -> bool:
    return is_hub_id(name) and "/" in name and not Path(name).exists()


def _options(options: Any) -> dict[str, Any]:
    """Those that make the run what it is: the usual ones, and others not at their defaults."""
    values = vars(options)
    told = {*MAY_CHANGE, *_ALWAYS, "model"} - {"ema_decay"}  # may change, and matters
    told |= unread(options)
    changed = [
        name
        for name, default in options.of.defaults.items()
        if values[name] != default and name not in told
    ]
    return {name: values[name] for name in (*_ALWAYS, *changed) if name in values}
