"""A run of any training: options, loop, log, checkpoints, engines, stop. Nothing of diffusion."""

from importlib.util import find_spec

_NEEDED = ("agsm_loss", "accelerate", "datasets", "diffusers", "filelock", "huggingface_hub",
           "matplotlib", "numpy", "peft", "PIL", "safetensors", "scipy", "tqdm", "transformers",
           "xxhash", "yaml")  # fmt: skip
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise SystemExit(f'missing: {", ".join(_missing)}. In the clone, run: pip install ".[recipes]"')
