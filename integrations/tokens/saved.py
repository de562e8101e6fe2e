"""Save, load and share soft tokens: safetensors and a JSON config, as the hub's libraries do.

>>> import os, tempfile
>>> from diffusers import SD3Transformer2DModel
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> from agsm_loss.integrations.tokens.saved import SavedTokens
>>> transformer = SD3Transformer2DModel(  # yours: pipe.transformer
...     sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
...     attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=16,
...     pooled_projection_dim=12, pos_embed_max_size=8,
... )
>>> denoiser = TokenDenoiser(transformer)
>>> folder = tempfile.mkdtemp()
>>> denoiser.save_pretrained(folder, base_model="stabilityai/stable-diffusion-3-medium-diffusers")
>>> sorted(os.listdir(folder))
['README.md', 'config.json', 'model.safetensors']
>>> denoiser.detach()

Later, in another process, or from the hub after `push_to_hub`:

>>> saved = SavedTokens.from_pretrained(folder)
>>> saved.backbone, saved.tokens.num_layers
('SD3Transformer2DModel', 3)
>>> attached = saved.attach(transformer)

Nothing here unpickles arbitrary code. The released checkpoints of AGSM and SoftREPA are pickles;
`import_agsm` and `import_softrepa` read them with `weights_only=True`, and allow
`torch.nn.Embedding` alone.
"""

import json
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agsm_loss import SoftTokens
from agsm_loss.integrations import how_to_install
from agsm_loss.integrations.tokens.attach import (
    AttachedTokens,
    attach_soft_tokens,
    move_to,
    unwrap,
)
from agsm_loss.integrations.tokens.unet import UNetBackbone

try:
    from huggingface_hub import ModelCardData, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    from agsm_loss.integrations.cards import quoted, save_card
except ImportError as error:
    raise ImportError(
        "agsm_loss.integrations.tokens.saved needs huggingface_hub and safetensors. "
        + how_to_install("diffusers")
    ) from error

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_CONFIG_KINDS: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "blocks": (list, NoneType),
    "base_model": (str, NoneType),
    "training": (dict,),
    "tokens": (dict,),
}
_TOKEN_KINDS: dict[str, tuple[type, ...]] = {
    "dim": (int,),
    "num_tokens": (int,),
    "num_layers": (int, NoneType),
    "banks": (str,),
    "time_buckets": (int, NoneType),
    "num_train_timesteps": (int,),
}
_BANKS = ("dual", "shared", "positive_only")
_DTYPES = {"BF16", "F16", "F32", "F64"}

_SD3_TEXT_WIDTH = 4096

_CARD = """
# Soft tokens for {{ line(backbone) }}

Dual soft tokens ψ⁺/ψ⁻ for `{{ line(backbone) }}`{% if base %} of `{{ line(base) }}`{% endif %},
trained with Alignment-Guided Score Matching (arXiv:2605.30038).
{{ "{:,}".format(count) }} parameters: {{ tokens }}.

```python
import torch
from diffusers import DiffusionPipeline

from agsm_loss.integrations.tokens.pipelines import Sampling, load_soft_tokens, set_sampling

pipe = DiffusionPipeline.from_pretrained({{ source }}).to(torch.float32)
attached = load_soft_tokens(pipe, "this folder or repository")
image = pipe(prompt="two cats on a sofa").images[0]

set_sampling(pipe, attached, Sampling.OFF)  # no tokens; other uses under guidance: see Sampling
attached.detach()  # the pipeline without them
```

## Training settings

{% if training -%}
| setting | value |
| --- | --- |
{%- for name, value in training.items() %}
| {{ cell(name) }} | `{{ cell(value) }}` |
{%- endfor %}
{%- else %}Not recorded.{% endif %}
"""


@dataclass
class SavedTokens(ModelHubMixin):
    """Soft tokens with what is needed to attach them to the right model again.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's.

    Attributes:
        tokens: the `SoftTokens`.
        backbone: class name of the denoiser that they were made for.
        blocks: for a UNet, which of "down", "mid", "up" get them; else None.
        base_model: hub id or path of the model that they were trained on, if known.
        training: settings worth keeping (JSON values).
    """

    tokens: SoftTokens
    backbone: str
    blocks: tuple[str, ...] | None = None
    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        attached: AttachedTokens,
        *,
        base_model: str | None = None,
        training: dict[str, Any] | None = None,
    ) -> "SavedTokens":
        """The tokens that are attached to a denoiser, with its class and their blocks."""
        attached.is_saved = True
        places = attached.backbone.places if isinstance(attached.backbone, UNetBackbone) else None
        name = type(attached.model).__name__
        return cls(attached.tokens, name, places, base_model, training or {})

    def attach(self, model: nn.Module) -> AttachedTokens:
        """Attach the tokens to the saved blocks, and move them to the model's device.

        As `attach_soft_tokens` does; a ValueError names the number that differs.
        """
        name = type(unwrap(model)).__name__
        if name != self.backbone:
            raise ValueError(f"model: expected a {self.backbone}, got a {name}.")
        attached = attach_soft_tokens(model, self.tokens, blocks=self.blocks)
        move_to(self.tokens, attached.model)
        return attached

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        t = self.tokens
        return {
            "format_version": FORMAT_VERSION,
            "backbone": self.backbone,
            "blocks": self.blocks,
            "base_model": self.base_model,
            "training": self.training,
            "tokens": {
                "dim": t.dim,
                "num_tokens": t.num_tokens,
                "num_layers": t.num_layers,
                "banks": t.banks,
                "time_buckets": None if t.time_tokens is None else t.time_tokens.num_embeddings,
                "num_train_timesteps": t.num_train_timesteps,
            },
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base class takes settings of no use here
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> "SavedTokens":
        """Tokens from a folder or a hub id; keywords as in `hf_hub_download`.

        The config's sizes are compared with the weights' header before anything is allocated.

        Raises:
            FileNotFoundError: it holds no soft tokens.
            ValueError: a damaged file, tensors that its config doesn't announce, or NaN in them.
        """
        source = str(pretrained_model_name_or_path)

        def fetch(name: str) -> Path:
            if Path(source).is_dir():
                path = Path(source) / name
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{source}: expected a folder of soft tokens with {CONFIG} and "
                        f"{WEIGHTS}, found no {name}."
                    )
                return path
            try:
                return Path(
                    hf_hub_download(
                        source,
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                    )
                )
            except LocalEntryNotFoundError:
                raise  # offline: nobody knows what the hub has
            except EntryNotFoundError as error:
                raise FileNotFoundError(
                    f"{source}: no {name}, so these are not soft tokens."
                ) from error

        config_path, weights_path = fetch(CONFIG), fetch(WEIGHTS)
        config = _read_config(config_path)
        return cls(
            _read_tokens(config["tokens"], weights_path),
            config["backbone"],
            None if config["blocks"] is None else tuple(config["blocks"]),
            config["base_model"],
            config["training"],
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        try:  # before any file is written
            config = json.dumps(self.config(), indent=2)
        except (TypeError, ValueError) as error:
            raise TypeError(f"training: expected names and JSON values, got {error}.") from None
        if wrong := [name for name in self.training if not isinstance(name, str)]:
            raise TypeError(f"training: expected texts as names, got {wrong[0]!r}.")
        state = {n: v.detach().cpu().contiguous() for n, v in self.tokens.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})
        (save_directory / CONFIG).write_text(config + "\n")
        base = self.base_model
        metadata = ModelCardData(
            library_name="agsm-loss",
            tags=["agsm", "soft-tokens", "text-to-image"],
            # The hub takes its ids alone; anything else is named in the text only.
            base_model=base if base and _is_hub_id(base) and not Path(base).exists() else None,
        )
        save_card(
            save_directory,
            metadata,
            _CARD,
            base=base,
            backbone=self.backbone,
            count=sum(p.numel() for p in self.tokens.parameters()),
            tokens=json.dumps(self.config()["tokens"]),
            source=quoted(base or f"a pipeline with a {self.backbone}"),
            training={name: json.dumps(value) for name, value in self.training.items()},
        )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _read_config(path: Path) -> dict[str, Any]:
    """The config, with the keys and types that `SavedTokens.config` writes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a config of soft tokens ({_first_line(error)}).") from error
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"{path}: not a config of soft tokens (no format_version in it).")
    if (version := config["format_version"]) != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {reprlib.repr(version)}. "
            "Upgrade agsm-loss."
        )
    _check_kinds(f"{path}: ", config, _CONFIG_KINDS)
    _check_kinds(f"{path}: tokens.", config["tokens"], _TOKEN_KINDS)
    if unknown := sorted(set(config["tokens"]) - set(_TOKEN_KINDS)):
        raise ValueError(f"{path}: tokens: unknown keys {reprlib.repr(unknown)}.")
    if (banks := config["tokens"]["banks"]) not in _BANKS:
        raise ValueError(f"{path}: tokens.banks: expected one of {_BANKS}, got {banks[:80]!r}.")
    if not all(isinstance(block, str) for block in config["blocks"] or ()):
        raise ValueError(f"{path}: blocks: expected names, got {reprlib.repr(config['blocks'])}.")
    return config


def _check_kinds(where: str, table: dict[str, Any], expected: dict[str, tuple[type, ...]]) -> None:
    for key, kinds in expected.items():
        value = table.get(key, ...)
        # By type(), since a bool is an int.
        if type(value) not in kinds or (type(value) is int and not 0 < value < 2**31):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            got = "none" if value is ... else reprlib.repr(value)
            raise ValueError(f"{where}{key}: expected {names}, got {got}.")


def _read_tokens(config: dict[str, Any], weights_path: Path) -> SoftTokens:
    expected = _shapes(**config)
    try:
        with safe_open(weights_path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(one.get_shape()) for name, one in slices.items()}
            dtypes = {one.get_dtype() for one in slices.values()}
            if expected != found or not dtypes <= _DTYPES:
                raise ValueError(
                    f"{weights_path}: expected tensors {expected} by its config, of "
                    f"{sorted(_DTYPES)}, got {found} of {sorted(dtypes)}."
                )
            state = {name: file.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise ValueError(
            f"{weights_path}: damaged or not safetensors ({error}). Copy or download it again."
        ) from error
    made = SoftTokens(**config)
    made.load_state_dict(state)
    for name, value in made.state_dict().items():
        _check_finite(f"{weights_path}: {name}", value)
    return made


def _shapes(
    dim: int,
    num_tokens: int,
    num_layers: int | None,
    banks: str,
    time_buckets: int | None,
    **_: Any,
) -> dict[str, tuple[int, ...]]:
    """Of the state of `SoftTokens`, from its arguments, and without making them."""
    layers = () if num_layers is None else (num_layers,)
    shapes = {"tokens": (2 if banks == "dual" else 1, *layers, num_tokens, dim)}
    if banks == "positive_only":
        shapes["frozen"] = (1, *layers, num_tokens, dim)
    if time_buckets is not None:
        shapes["time_tokens.weight"] = (time_buckets, math.prod(layers) * dim)
    return shapes


def import_agsm(tokens: str | Path, time_tokens: str | Path | None = None) -> SoftTokens:
    """Released AGSM tokens: `soft_tokens.pth` (2, n, d) or (2, L, n, d), `soft_t_tokens.pth`.

    Raises:
        ValueError: another shape, or a file that holds anything but tensors and an nn.Embedding.
    """
    base = _load_tensor(tokens)
    if base.ndim not in (3, 4) or base.shape[0] != 2:
        raise ValueError(
            f"{tokens}: expected shape (2, n, d) or (2, L, n, d), got {tuple(base.shape)}. "
            "One-bank tokens of SoftREPA are read by import_softrepa."
        )
    return _assemble(base, time_tokens, banks="dual")


def import_softrepa(
    tokens: str | Path,
    time_tokens: str | Path | None = None,
    *,
    context_embedder: nn.Linear | None = None,
) -> SoftTokens:
    """Released SoftREPA tokens: `dc_tokens.pth` (n, d) or (L, n, d), `dc_t_tokens.pth`; one bank.

    Args:
        tokens: path of the base tokens.
        time_tokens: path of the time tokens, if there are any.
        context_embedder: that of the SD3 transformer, for tokens of SoftREPA's present training
            code. They are as wide as the text encoder's output; this frozen layer, applied
            here, makes them as wide as the transformer.

    Raises:
        ValueError: as `import_agsm`; or tokens 4096 wide, without their `context_embedder`.
    """
    base = _load_tensor(tokens)
    if base.ndim not in (2, 3):
        raise ValueError(
            f"{tokens}: expected shape (n, d) or (L, n, d), got {tuple(base.shape)}. "
            "Two-bank tokens of AGSM are read by import_agsm."
        )
    if context_embedder is not None:
        if base.shape[-1] != context_embedder.in_features:
            raise ValueError(
                f"{tokens}: expected tokens {context_embedder.in_features} wide for this "
                f"context_embedder, got {base.shape[-1]}. Leave context_embedder out for tokens "
                "that are as wide as the transformer."
            )
        weight, bias = (
            None if p is None else p.detach().float().cpu()
            for p in (context_embedder.weight, context_embedder.bias)
        )
        base = F.linear(base, weight, bias)
    elif base.ndim == 3 and base.shape[-1] == _SD3_TEXT_WIDTH:
        raise ValueError(
            f"{tokens}: tokens of SoftREPA's present SD3 training, {_SD3_TEXT_WIDTH} wide, go "
            "through the transformer's context_embedder first. Pass "
            "context_embedder=pipe.transformer.context_embedder."
        )
    return _assemble(base.unsqueeze(0), time_tokens, banks="shared")


def _assemble(base: Tensor, time_path: str | Path | None, *, banks: Any) -> SoftTokens:
    """From (banks, L, n, d) or (banks, n, d) and an embedding (buckets, L·d)."""
    num_layers = base.shape[1] if base.ndim == 4 else None
    time = None if time_path is None else _load_tensor(time_path)
    width = base.shape[-1] * (num_layers or 1)
    if time is not None and (time.ndim != 2 or time.shape[1] != width):
        raise ValueError(
            f"{time_path}: expected an embedding (buckets, {width}) for tokens "
            f"{tuple(base.shape)}, got {tuple(time.shape)}."
        )
    made = SoftTokens(
        base.shape[-1],
        num_tokens=base.shape[-2],
        num_layers=num_layers,
        banks=banks,
        time_buckets=None if time is None else time.shape[0],
        init=base,
    )
    if time is not None and made.time_tokens is not None:
        with torch.no_grad():
            made.time_tokens.weight.copy_(time)
    return made


def _load_tensor(path: str | Path) -> Tensor:
    """The tensor of a pickled parameter, tensor or nn.Embedding; nothing else is unpickled."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with torch.serialization.safe_globals([nn.Embedding]):
                value = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(value, nn.Embedding):
                value = value.weight
        except Exception as error:  # a damaged pickle can raise any
            raise ValueError(
                f"{path}: refused. Expected a tensor, parameter or torch.nn.Embedding saved by "
                f"torch.save, and nothing else is unpickled ({type(error).__name__})."
            ) from error
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: expected a tensor or nn.Embedding, got {type(value).__name__}.")
    if (
        value.device.type != "cpu"
        or value.layout != torch.strided
        or not value.is_floating_point()
        or not 0 < value.numel() * value.element_size() <= size  # a small storage can be expanded
    ):
        raise ValueError(
            f"{path}: refused. Expected a floating-point tensor that is stored as a whole, got "
            f"{value.dtype} {tuple(value.shape)} in {size} bytes."
        )
    value = value.detach().float()
    _check_finite(str(path), value)
    return value


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise ValueError(
            f"{name}: expected finite numbers, got {bad} of {value.numel()} that are NaN or "
            "infinite. Their training diverged; take an earlier checkpoint."
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
