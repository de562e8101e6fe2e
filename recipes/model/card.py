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

from huggingface_hub import ModelCard, ModelCardData

from data.sources import is_hub_id
from model.families import guidance
from run.checkpoints import MAY_CHANGE
from run.cli import command_of
from run.log import USED, lines_of

_NAMES = {"tokens": "Soft tokens", "lora": "A LoRA", "pipeline": "A pipeline"}
_ALWAYS = ("learning_rate", "train_batch_size", "gradient_accumulation_steps", "max_train_steps",
           "num_epochs", "seed", "mixed_precision", "data")  # fmt: skip
_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_BODY = """
# {name}, trained by {method}

{name} for `{model}` ({pipeline}): {parameters:,} parameters were trained{together}.

```python
{code}
```
{more}
## Training

    {command}

Of {processes} process(es); options that are not at their defaults, and the usual ones:

{options}

## At the end

{scores}
"""
_TOKENS = """

set_sampling(pipe, attached, Sampling.OFF)  # no tokens; other uses under guidance: see Sampling
attached.detach()  # the pipeline without them"""
_KOHYA = """
The same for tools that read kohya's names, such as ComfyUI and A1111:

```python
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

lora = load_file({weights})
save_file(convert_state_dict_to_kohya(lora), {kohya})
```
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
    output = Path(run.options.output_dir)
    sheets = sorted((output / "sheets").glob("[0-9]*.png"))
    for kind, folder in saved.items():
        more = ""
        if kind == "lora" and hasattr(run.pipe, "unet"):
            more += _KOHYA.format(
                weights=_quoted(folder / "pytorch_lora_weights.safetensors"),
                kohya=_quoted(f"{folder}_kohya.safetensors"),
            )
        if sheets:
            shutil.copyfile(sheets[-1], folder / "sheet.png")
            more += "\nValidation prompts after training:\n\n![sheet](sheet.png)\n"
        others = [f"`{one}`" for name, one in saved.items() if name != kind]
        text = _BODY.format(
            name=_NAMES[kind],
            method=run.method,
            model=run.options.model,
            pipeline=type(run.pipe).__name__,
            parameters=run.parameters,
            together=f", together with {' and '.join(others)}" if others else "",
            code=_code(saved, run),
            more=more,
            command=command_of(run.options),
            processes=run.processes,
            options=_table(("option", "value"), _options(run.options)),
            scores=_scores(output / "log.jsonl"),
        )
        card = f"---\n{_metadata(kind, run).to_yaml()}\n---\n{text}"
        ModelCard(card).save(folder / "README.md")


def _code(saved: Mapping[str, Path], run: Trained) -> str:
    """Loads all that was trained together, and makes an image."""
    options = run.options
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if "tokens" in saved:
        lines += [
            "",
            "from agsm_loss.integrations.tokens.pipelines import (",
            *("    Sampling,", "    load_soft_tokens,", "    set_sampling,", ")"),
        ]
    base = _quoted(saved.get("pipeline", options.model))
    lines += [
        "",
        f"pipe = DiffusionPipeline.from_pretrained({base})",
        f"dtype = torch.{_DTYPES[options.mixed_precision]}",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu", dtype)',
    ]
    if options.merge_lora and "pipeline" not in saved:
        lines += [
            f"pipe.load_lora_weights({_quoted(options.merge_lora)})  # training began with it",
            "pipe.fuse_lora()",
            "pipe.unload_lora_weights()",
        ]
    if "lora" in saved:
        lines.append(f"pipe.load_lora_weights({_quoted(saved['lora'])})")
    if "tokens" in saved:
        lines.append(f"attached = load_soft_tokens(pipe, {_quoted(saved['tokens'])})")
    call = {
        "num_inference_steps": options.validation_inference_steps,
        **guidance(run.pipe, options.validation_guidance_scale),
        **run.arguments,
    }
    lines += [
        "image = pipe(",
        f"    prompt={_quoted(run.prompt)},",
        *(f"    {name}={value!r}," for name, value in call.items()),
        ").images[0]",
    ]
    return "\n".join(lines) + (_TOKENS if "tokens" in saved else "")


def _quoted(text: str | Path) -> str:
    """As a string of Python."""
    text = str(text)
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


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
    changed = [
        name
        for name, default in options.of.defaults.items()
        if values[name] != default and name not in told
    ]
    return {name: values[name] for name in (*_ALWAYS, *changed) if name in values}


def _scores(log: Path) -> str:
    """The last metrics and, where images were scored, the first and last scores."""
    lines = [json.loads(line) for line in lines_of(log)]
    measured = {name: value for line in lines for name, value in line.items()
                if isinstance(value, float) and name not in USED}  # fmt: skip
    text = _table(("metric", "value"), {name: f"{one:.4g}" for name, one in measured.items()})
    scored = [line for line in lines if line.get("scores")]
    if not scored:
        return text
    shown = scored[:1] + scored[1:][-1:]
    scores = [line["scores"] for line in shown]
    rows = {"overall": [f"{one['overall']:.3f}" for one in scores]}
    for name in scores[-1]["categories"]:
        rows[name] = [f"{one['categories'][name]['score']:.3f}" for one in scores]
    titles = ("validation", *(f"step {line['step']}" for line in shown))
    number = f"Shares of right images on {scores[-1]['n']} validation prompts.\n\n"
    return number + _table(titles, rows) + "\n\n" + text


def _table(titles: tuple[str, ...], rows: Mapping[str, Any]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for name, cells in rows.items():
        shown = cells if isinstance(cells, list) else [f"`{cells}`"]
        lines.append("| " + " | ".join([name, *(one.replace("|", "\\|") for one in shown)]) + " |")
    return "\n".join(lines)
