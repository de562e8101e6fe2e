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
import pickle
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss import SoftTokens
from agsm_loss.integrations.tokens.attach import (
    AttachedTokens,
    attach_soft_tokens,
    move_to,
    unwrap,
)
from agsm_loss.integrations.tokens.unet import UNetBackbone

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(
        "agsm_loss.integrations.tokens.saved needs huggingface_hub and safetensors: "
        'pip install "agsm-loss[diffusers]"'
    ) from error

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_CARD = """---
library_name: agsm-loss
tags: [agsm, soft-tokens, text-to-image]
{base}---

# Soft tokens for {backbone}

Dual soft tokens ψ⁺/ψ⁻ for `{backbone}`{of}, trained with Alignment-Guided Score Matching
(arXiv:2605.30038). {count:,} parameters: {tokens}.

```python
from agsm_loss.integrations.tokens.pipelines import load_soft_tokens

load_soft_tokens(pipe, "this folder or repository")
image = pipe(prompt).images[0]
```

Training settings: {training}
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Any:
        """Tokens from a folder or a hub id; `settings` as in `ModelHubMixin.from_pretrained`.

        Raises:
            FileNotFoundError: it holds no soft tokens.
            ValueError: a damaged file, or tensors that its config doesn't announce.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **settings)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: not a config of soft tokens ({error})."
            ) from error

    def _save_pretrained(self, save_directory: Path) -> None:
        config = json.dumps(self.config(), indent=2)  # before any file is written
        state = {n: v.detach().cpu().contiguous() for n, v in self.tokens.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})
        (save_directory / CONFIG).write_text(config + "\n")
        # The hub's metadata take ids alone; a local folder is named in the text only.
        named = self.base_model and not Path(self.base_model).exists()
        card = _CARD.format(
            base=f"base_model: {self.base_model}\n" if named else "",
            of=f" of {self.base_model}" if self.base_model else "",
            backbone=self.backbone,
            count=sum(p.numel() for p in self.tokens.parameters()),
            tokens=json.dumps(self.config()["tokens"]),
            training=json.dumps(self.training) if self.training else "not recorded.",
        )
        ModelCard(card).save(save_directory / "README.md")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **config: Any,
    ) -> "SavedTokens":
        # `config` is the mixin's reading of config.json, without its tokens; it is read below.
        unknown = set(config) - {f.name for f in fields(cls)} - {"config"}
        if unknown:
            raise TypeError(f"from_pretrained: unknown arguments {sorted(unknown)}.")

        def fetch(name: str) -> Path:
            if Path(model_id).is_dir():
                path = Path(model_id) / name
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{model_id}: expected a folder of soft tokens with {CONFIG} and "
                        f"{WEIGHTS}, found no {name}."
                    )
                return path
            try:
                return Path(
                    hf_hub_download(
                        model_id,
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                    )
                )
            except EntryNotFoundError as error:
                raise FileNotFoundError(
                    f"{model_id}: no {name}, so these are not soft tokens."
                ) from error

        return cls._read(fetch(CONFIG), fetch(WEIGHTS))

    @classmethod
    def _read(cls, config_path: Path, weights_path: Path) -> "SavedTokens":
        try:
            config = json.loads(config_path.read_text())
            version = config["format_version"]
            made = SoftTokens(**config["tokens"]) if version == FORMAT_VERSION else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{config_path}: not a config of soft tokens ({error!r}).") from error
        if made is None:
            raise ValueError(
                f"{config_path}: expected format_version {FORMAT_VERSION}, got {version}. "
                "Upgrade agsm-loss."
            )
        try:
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(
                f"{weights_path}: damaged or not safetensors ({error}). Copy or download it again."
            ) from error
        expected = {n: tuple(v.shape) for n, v in made.state_dict().items()}
        found = {n: tuple(v.shape) for n, v in state.items()}
        if expected != found:
            raise ValueError(
                f"{weights_path}: expected tensors {expected} by its config, got {found}."
            )
        made.load_state_dict(state)
        blocks = None if config["blocks"] is None else tuple(config["blocks"])
        return cls(made, config["backbone"], blocks, config["base_model"], config["training"])


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


def import_softrepa(tokens: str | Path, time_tokens: str | Path | None = None) -> SoftTokens:
    """Released SoftREPA tokens: `dc_tokens.pth` (n, d) or (L, n, d), `dc_t_tokens.pth`; one bank.

    Raises:
        ValueError: as `import_agsm`.
    """
    base = _load_tensor(tokens)
    if base.ndim not in (2, 3):
        raise ValueError(
            f"{tokens}: expected shape (n, d) or (L, n, d), got {tuple(base.shape)}. "
            "Two-bank tokens of AGSM are read by import_agsm."
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
    try:
        with torch.serialization.safe_globals([nn.Embedding]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path}: refused. Expected a tensor, parameter or torch.nn.Embedding saved by "
            f"torch.save, and nothing else is unpickled ({reason})."
        ) from error
    if isinstance(value, nn.Embedding):
        value = value.weight
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: expected a tensor or nn.Embedding, got {type(value).__name__}.")
    return value.detach().float()
