"""Latents and text embeddings on disk: `--precompute FOLDER` takes the encoders out of the loop.

    fill = precompute(options.precompute, trained.model, accelerator)    wraps the encoders
    fill(items, number)             (index, batch) of every micro-step to come, and how many

An entry is what an encoder gives for one text or one image: a latent's mean and standard deviation,
not a draw, so that a run has the same numbers with and without. It is found by what is encoded (the
text, or the pixels as the model sees them) and by all that encodes it. Where an encoder, its LoRA,
its dtype, its tokenizer or a library's version is another, entries are made anew. Each has a hash,
by which damage is noticed.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
import xxhash
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from agsm_loss import caption_pool
from agsm_loss.integrations.prompts import ENCODED, Row
from model.pipeline import Encoder, TextToImage
from run.log import say
from run.options import option

LOGGER = logging.getLogger(__name__)
FILE_BYTES = 2**28
"""A file's size. A run that is killed loses the entries of one file at most."""
Fill = Callable[[Iterable[tuple[int, Any]], int], None]


@dataclass(frozen=True)
class PrecomputeOptions:
    """Of the recipes whose images and captions are all known before the first step."""

    precompute: str = option(
        "",
        "Folder in which latents and text embeddings are kept, made before the first step; the VAE "
        "and the text encoders are then off the accelerator. Runs can share it. Empty: everything "
        "is encoded in each step.",
    )


class Store:
    """Rows of tensors by key, in memory-mapped safetensors files of one folder.

    A file has its name only once it is whole. Any number of processes may read and write the
    folder. A file with damage is put aside with a warning: later stores miss its rows, this one
    those that are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._rows: dict[str, tuple[Path, list[str], str]] = {}  # key -> file, tensors, their hash
        self._unsaved: dict[str, Row] = {}
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._read_new_files()

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def __getitem__(self, key: str) -> Row:
        row = self.find(key)
        if row is None:
            raise KeyError(key)
        return row

    def find(self, key: str) -> Row | None:
        """The row as it was stored, or None."""
        if key in self._unsaved:
            return self._unsaved[key]
        if key not in self._rows:
            return None
        path, names, digest = self._rows[key]
        row = {name: self._files[path].get_tensor(f"{key}.{name}") for name in names}
        if _hash_of(row) == digest:
            return row
        del self._rows[key]
        self._put_aside(path, "an entry is not what was written")
        return None

    def __setitem__(self, key: str, row: Row) -> None:
        self._unsaved[key] = {name: value.cpu().clone() for name, value in row.items()}
        self._bytes += sum(value.nbytes for value in row.values())
        if self._bytes >= FILE_BYTES:
            self.save()

    def save(self) -> None:
        """Writes what is not yet in a file, and finds what others have written."""
        if self._unsaved:
            part = self.folder / f"{uuid.uuid4().hex}.part"
            rows = self._unsaved.items()
            try:
                save_file(
                    {f"{key}.{name}": value for key, row in rows for name, value in row.items()},
                    part,
                    {key: _hash_of(row) for key, row in rows},
                )
                part.rename(part.with_suffix(".safetensors"))
            except (OSError, SafetensorError) as error:
                part.unlink(missing_ok=True)
                raise OSError(
                    f"{self.folder}: {part.name} could not be written: {error}. Make room on the "
                    "disk, then start again: the entries that are there are found."
                ) from error
            self._unsaved, self._bytes = {}, 0
        self._read_new_files()

    def _read_new_files(self) -> None:
        for path in self.folder.glob("*.part"):  # of killed runs
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._files:
                continue
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                self._put_aside(path, error)
                continue
            self._files[path] = file
            tensors: dict[str, list[str]] = {}
            for full in file.keys():  # noqa: SIM118 (no mapping)
                key, _, name = full.partition(".")
                tensors.setdefault(key, []).append(name)
            for key, digest in (file.metadata() or {}).items():
                self._rows.setdefault(key, (path, tensors.get(key, []), digest))

    def _put_aside(self, path: Path, why: object) -> None:
        aside = path.with_suffix(".damaged")  # not removed: others may have mapped it
        if path.exists():
            LOGGER.warning("%s is damaged (%s): now %s, to be made again.", path, why, aside.name)
        with suppress(FileNotFoundError):  # another process did it
            path.rename(aside)


def _hash_of(row: Row) -> str:
    digest = xxhash.xxh3_128()
    for name, value in sorted(row.items()):
        digest.update(f"{name}: {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


class Cached:
    """An encoder whose rows are kept in a store: itself an `Encoder`.

    found, made: how many of the different items were there before, and were encoded.
    """

    def __init__(self, encode: Encoder, key_of: Callable[[Any], str], store: Store) -> None:
        self.encode, self.key_of, self.store = encode, key_of, store
        self.found = self.made = 0
        self._seen: set[str] = set()
        self._wanted: dict[str, Any] = {}

    def __call__(self, items: Iterable[Any]) -> list[Row]:
        by_key = [(self.key_of(item), item) for item in items]
        rows = {key: self.store.find(key) for key, _ in by_key}
        missing = {key: item for key, item in by_key if rows[key] is None}
        self.found += len(rows.keys() - missing - self._seen)
        self._seen.update(rows)
        if missing:
            self._wanted |= missing
            self.make(1)
            rows |= {key: self.store[key] for key in missing}
            self.store.save()
        return [rows[key] for key, _ in by_key]

    def want(self, items: Iterable[Any]) -> None:
        """Notes the items that are missing, for `make`. What is there is read once, as a check."""
        for item in items:
            key = self.key_of(item)
            if key not in self._seen:
                self._seen.add(key)
                if key in self.store:
                    self.found += 1
                else:
                    self._wanted[key] = item

    def make(self, least: int) -> None:
        """Encodes what is wanted, `ENCODED` at a time, while that is so many at least."""
        while len(self._wanted) >= least:
            keys = list(self._wanted)[:ENCODED]
            rows = self.encode([self._wanted.pop(key) for key in keys])
            for key, row in zip(keys, rows, strict=True):
                self.store[key] = row
            self.made += len(keys)


def precompute(folder: str, model: TextToImage, accelerator: Accelerator) -> Fill | None:
    """Gives the model cached encoders, and returns what fills the cache; None without a folder.

    Once it is filled, the text encoders and the VAE are on the CPU (`TextToImage.offload`).
    """
    if not folder:
        return None
    root = Path(folder)
    in_text = Store(root / f"text-{text_identity(model)}")
    in_images = Store(root / f"images-{image_identity(model)}")
    texts = Cached(model.text_rows, _key_of_text, in_text)
    images = Cached(model.image_rows, _key_of_image, in_images)
    model.text_rows, model.image_rows = texts, images

    def fill(items: Iterable[tuple[int, Any]], number: int) -> None:
        shown = accelerator.is_local_main_process
        try:
            for _, batch in tqdm(items, "Precomputing", number, disable=not shown, mininterval=2):
                images.want(batch.pixels)
                texts.want([*caption_pool(batch.captions, batch.hard), ""])
                for one in (texts, images):
                    one.make(ENCODED)
            for one in (texts, images):
                one.make(1)
        finally:
            for one in (texts, images):
                one.store.save()
        model.offload()
        counts = [texts.found + images.found, texts.made + images.made]
        found, made = accelerator.reduce(torch.tensor(counts, device=accelerator.device)).tolist()
        if accelerator.is_main_process:
            size = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
            say(f"Precomputed: {found:,} entries found, {made:,} made; {root}: {size / 1e9:.3g} GB")

    return fill


def text_identity(model: TextToImage) -> str:
    """A hash of all that a prompt's embeddings depend on besides the prompt."""
    parts = {n: p for n, p in model.pipe.components.items() if n.startswith(("text_", "tokenizer"))}
    width = getattr(model.denoiser.config, "joint_attention_dim", None)  # of absent encoders' zeros
    return _identity(model, parts, model.arguments, width)


def image_identity(model: TextToImage) -> str:
    """A hash of all that an image's latents depend on besides its pixels."""
    return _identity(model, {"vae": model.pipe.vae})


def _identity(model: TextToImage, parts: dict[str, Any], *others: Any) -> str:
    versions = [one.__version__ for one in (torch, diffusers, transformers)]
    about = ["hashed", versions, type(model.pipe).__name__, model.device.type, others]
    digest = xxhash.xxh3_128(repr(about).encode())
    for name, part in sorted(parts.items()):
        digest.update(f"{name}: {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
            public = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps(public, sort_keys=True, default=str).encode())
            digest.update(_hash_of(part.state_dict()).encode())
            for key, layer in part.named_modules():
                if isinstance(layer, BaseTunerLayer):  # of a LoRA, whose strength is no tensor
                    used = layer.active_adapters, layer.disable_adapters, layer.merged_adapters
                    strength = getattr(layer, "scaling", None)
                    digest.update(f"{key}: {strength} {used}".encode())
        elif part is not None:
            digest.update(_tokenizer(part).encode())
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    """Its files, without the padding and truncation of its latest call."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        texts = {file.name: file.read_text() for file in sorted(Path(folder).iterdir())}
    if "tokenizer.json" in texts:
        table = json.loads(texts["tokenizer.json"])
        texts["tokenizer.json"] = json.dumps(table | {"padding": None, "truncation": None})
    return json.dumps(texts)


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _key_of_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _key_of_image(pixels: Tensor) -> str:
    digest = xxhash.xxh3_128(f"{pixels.dtype} {tuple(pixels.shape)}".encode())
    digest.update(_bytes(pixels))
    return digest.hexdigest()
