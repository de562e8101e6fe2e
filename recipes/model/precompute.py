"""Latents and text embeddings on disk: `--precompute FOLDER` takes the encoders out of the loop.

    fill = precompute(options.precompute, trained.model, accelerator)    wraps the encoders
    fill(items, number)             (index, batch) of every micro-step to come, and how many

An entry is what an encoder gives for one text or one image: a latent's mean and standard deviation,
not a draw, so that a run has the same numbers with and without. It is found by what is encoded (the
text, or the pixels as the model sees them) and by all that encodes it. Where an encoder, its dtype,
its tokenizer or a library's version is another, entries are made anew.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
import transformers
import xxhash
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from agsm_loss import caption_pool
from model.families import ENCODED, Row
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
    folder. A damaged file is removed with a warning, and its rows are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: set[str] = set()
        self._rows: dict[str, tuple[Any, list[str]]] = {}  # key -> open file, names of tensors
        self._unsaved: dict[str, Row] = {}
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._read_new_files()

    def __contains__(self, key: str) -> bool:
        return key in self._rows or key in self._unsaved

    def __getitem__(self, key: str) -> Row:
        if key in self._unsaved:
            return self._unsaved[key]
        file, names = self._rows[key]
        return {name: file.get_tensor(f"{key}.{name}") for name in names}

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
            save_file(
                {f"{key}.{name}": value for key, row in rows for name, value in row.items()}, part
            )
            part.rename(part.with_suffix(".safetensors"))
            self._unsaved, self._bytes = {}, 0
        self._read_new_files()

    def _read_new_files(self) -> None:
        for path in self.folder.glob("*.part"):  # of killed runs
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._files:
                continue
            self._files.add(path.name)
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                LOGGER.warning("%s is damaged (%s): removed, to be made again.", path, error)
                path.unlink(missing_ok=True)
                continue
            for full in file.keys():  # noqa: SIM118 (no mapping)
                key, name = full.split(".", 1)
                names = self._rows.setdefault(key, (file, []))
                if names[0] is file:
                    names[1].append(name)


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
        items = list(items)
        made = self.made
        self.want(items)
        self.make(1)
        if self.made > made:
            self.store.save()
        return [self.store[self.key_of(item)] for item in items]

    def want(self, items: Iterable[Any]) -> None:
        """Notes the items that are missing, for `make`."""
        for item in items:
            key = self.key_of(item)
            if key not in self._seen:
                self._seen.add(key)
                self.found += key in self.store
            if key not in self.store:
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
    texts, images = (
        Cached(encode, key_of, Store(root / f"{name}-{identity}"))
        for name, encode, key_of, identity in (
            ("text", model.text_rows, _key_of_text, text_identity(model)),
            ("images", model.image_rows, _key_of_image, image_identity(model)),
        )
    )
    model.text_rows, model.image_rows = texts, images

    def fill(items: Iterable[tuple[int, Any]], number: int) -> None:
        shown = accelerator.is_local_main_process
        try:
            for _, batch in tqdm(items, "Precomputing", number, disable=not shown, mininterval=2):
                images.want(batch.pixels)
                texts.want(caption_pool(batch.captions, batch.hard, null=True))
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
    about = [versions, type(model.pipe).__name__, model.device.type, others]
    digest = xxhash.xxh3_128(repr(about).encode())
    for name, part in sorted(parts.items()):
        digest.update(f"{name}: {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
            public = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(json.dumps(public, sort_keys=True, default=str).encode())
            for key, value in part.state_dict().items():
                digest.update(f"{key}: {value.dtype} {tuple(value.shape)}".encode())
                digest.update(_bytes(value))
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
