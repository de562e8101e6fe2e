"""Random captions, tables, prompt files, images and checkpoints against what reads them.

    python -m recipes.lab.fuzz --seconds 3600 --seed 0
    python -m recipes.lab.fuzz --seed 0 --repeat tables:123     one case again, with its traceback

A case is a function of (seed, kind, number). Its files are read, with every row of theirs in what
is read or counted in a message; or the recipes refuse them by an error of their own, in one line.
Anything else fails: an error of another kind, a hang, a row that is gone. What is whole is read.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import linecache
import logging
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file

from agsm_loss import InBatch
from agsm_loss.integrations.prompts import caption_ids
from agsm_loss.integrations.tokens.pipelines import load_soft_tokens
from data.batches import read_image
from data.pictures import read_picture
from data.prompts import DELIMITERS, is_unicode, normal, read_prompts, texts_of
from data.task import Task
from model.pipeline import TextToImage
from run.checkpoints import RunState, digest_of, opened
from run.log import quiet_libraries

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "recipes/lab/models/flow"
SECONDS = 60
"""Of the CPU's time; a case that takes longer, or ten times as long by the clock, hangs."""
PIECES = [
    *("two red circles", "a", " ", "  ", "\t", "\n", "\r\n", "\r", "\u2028", "\x85", "\x1c"),
    *("\ufeff", "\u200b", "\0", "\xe9", "e\u0301", "\u212b", "\u4e2d\u6587", "\U0001f469\u200d"),
    *("\u202e", '"', "'", ",", "\\", "|", "<|endoftext|>", "{}", "%s", "NA", "null", "=1", "7"),
    *("\ud800", "two red circles and one blue square " * 20),
]


class RuleError(AssertionError):
    """The rule does not hold."""


class Hang(BaseException):
    """No reader takes it for an error of a file."""


@dataclass
class Case:
    """A try: its draws, its empty folder, the messages so far, and whether it has to be read."""

    rng: random.Random
    folder: Path
    told: list[str] = field(default_factory=list)
    whole: bool = False

    def counted(self) -> int:
        """Rows that the messages say are not read."""
        found = (re.search(r": (\d+) .* not read\.$", one) for one in self.told)
        return sum(int(one[1]) for one in found if one)

    def text(self) -> str:
        return "".join(self.rng.choices(PIECES, k=self.rng.randrange(5)))

    def damaged(self, content: bytes) -> bytes:
        """Cut, with a hole, with zeros or more in it, with other bits; or other bytes."""
        rng, size = self.rng, len(content)
        first, last = sorted(rng.randrange(size + 1) for _ in range(2))
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 4, 40]) if size else 0):
            flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        more = rng.choice([rng.randbytes(99), content, bytes(99)])
        return rng.choice([
            content[:last], content[:first] + content[last:], content + more, bytes(flipped),
            content[:first] + bytes(last - first) + content[last:], rng.randbytes(size % 99),
        ])  # fmt: skip


def captions(case: Case) -> None:
    """Those compete that the encoder tells apart, and empty ones never do."""
    texts = [one for one in (normal(case.text()) for _ in range(6)) if is_unicode(one)]
    for text in texts:
        if normal(text) != text or (text and texts_of([text, None, 7, " "]) != [text]):
            raise RuleError(f"{text!r}: normalized again it is another")
    if texts:
        case.whole, model = True, _model()
        found = InBatch(3, allow_empty=True)(caption_ids(model.pipe, texts, **model.arguments))
        rows = model.encode_text([*texts, ""]).values()
        encoded = torch.cat([one.flatten(1) for one in rows], 1)
        for i, place in found.mask[:, 1:].nonzero().tolist():
            j = int(found.index[i, place + 1])
            if any(torch.equal(encoded[a], encoded[b]) for a, b in ((i, j), (i, -1), (j, -1))):
                raise RuleError(f"{texts[j]!r} competes with {texts[i]!r}")


@cache
def _model() -> TextToImage:
    return TextToImage.load(str(MODEL), torch.float32)


def prompts(case: Case) -> None:
    """Every line or row is a prompt, in their order."""
    kind = case.rng.choice(["txt", "csv", "tsv", "json", "jsonl"])
    texts = [case.text() for _ in range(case.rng.randrange(6))]
    if kind == "txt":
        texts = [part for text in texts for part in text.split("\n") if normal(part)]
    if not kind.startswith("json"):
        texts = [one.replace("\ud800", "?") for one in texts]
    case.whole = bool(texts) and all(normal(one) and is_unicode(one) for one in texts)
    file = case.folder / f"p.{kind}"
    _write(case, file, [{"prompt": one, "tag": "\xe9"} for one in texts])
    found = [row["prompt"] for row in read_prompts(str(file))]
    if case.whole and found != list(map(normal, texts)):
        raise RuleError(f"{texts} became {found}")
    if len(found) != _rows_in(file):
        raise RuleError(f"{_rows_in(file)} rows became {len(found)}")


def _write(case: Case, file: Path, rows: list[dict[str, Any]]) -> None:
    """A text file of one of the kinds, half of the time damaged or in another encoding."""
    kind, out, rng = file.suffix.lower()[1:], io.StringIO(), case.rng
    if kind in ("csv", "tsv"):
        table = csv.writer(out, delimiter=DELIMITERS[file.suffix.lower()])
        table.writerows([list(rows[0] if rows else ["caption"]), *(row.values() for row in rows)])
    elif kind == "txt":
        out.write("\n".join(row["prompt"] for row in rows))
    elif kind == "json":
        json.dump(rows, out, ensure_ascii=rng.random() < 0.5 or "\\ud8" in json.dumps(rows))
    else:
        out.write("\n".join(map(json.dumps, rows)))
    content = rng.choice(["", "\ufeff"]) + out.getvalue()
    file.write_bytes(content.encode("utf-8"))
    if rng.random() < 0.5:
        case.whole = False
        encoded = content.encode(rng.choice(["utf-16", "cp1252", "utf-8"]), "replace")
        header = content.partition("\n")[0].encode()
        bent = content.replace(rng.choice(['"', ",", "\t", "{", "caption", "prompt", "\n"]), "", 1)
        file.write_bytes(rng.choice([encoded, header, bent.encode(), case.damaged(encoded)]))


def _rows_in(file: Path) -> int:
    """Rows of a text file that could be read, counted in another way."""
    content, kind = file.read_bytes().decode("utf-8-sig"), file.suffix.lower()
    if kind in DELIMITERS:
        lines = csv.reader(io.StringIO(content, newline=""), delimiter=DELIMITERS[kind])
        return sum(map(bool, lines)) - 1
    if kind == ".json":
        try:
            whole = json.loads(content)
            return len(whole) if isinstance(whole, list) else 1
        except ValueError:
            pass
    clean = normal if kind == ".txt" else str.strip
    return sum(bool(clean(line)) for line in content.split("\n"))


@dataclass
class Pair:
    """A caption's cell, and a picture whose colour is the row's number; bytes b"" are no file."""

    cell: Any
    picture: bytes
    file: Path

    def good(self) -> list[str]:
        """Its texts; none where the row cannot be read."""
        try:
            return texts_of(self.cell) if len(self.picture) > 60 else []
        except ValueError:
            return []


def _pairs(case: Case, kind: str) -> list[Pair]:
    rng, made = case.rng, []
    (case.folder / "data").mkdir()
    listed = kind in ("parquet", "json", "jsonl", "coco") and rng.random() < 0.3
    odd = kind.startswith("json") and rng.random() < 0.1
    for i in range(rng.randrange(9)):
        cells = [case.text() for _ in range(rng.randrange(4) if listed else 1)]
        if not kind.startswith("json"):
            cells = [one.replace("\ud800", "?") for one in cells]
        cell = cells if listed else cells[0]
        if odd and i == 1:
            cell = rng.choice([7, True, {"en": "a"}, [["a"]], float("nan")])
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(content, "PNG")
        picture = rng.choice([*[content.getvalue()] * 9, b"", content.getvalue()[:40]])
        pair = Pair(None if rng.random() < 0.1 else cell, picture, case.folder / f"data/{i}.png")
        made.append(pair)
        if picture:
            pair.file.write_bytes(picture)
    return made


def tables(case: Case) -> None:
    """Every row of a table is in it or counted, and is trained on or told as unreadable."""
    kind = case.rng.choice(sorted(FORMS))
    pairs = _pairs(case, kind)
    unicode = all(map(is_unicode, (json.dumps(one.cell, ensure_ascii=False) for one in pairs)))
    plain = all(isinstance(one.cell, str | list | None) and one.cell != [["a"]] for one in pairs)
    good = [one.good() for one in pairs]
    case.whole = unicode and plain and any(good)
    image, text = ("png", "txt") if kind == "tar" else ("image", "caption")
    data, files = FORMS[kind](case, pairs, kind)
    if case.whole and kind in ("coco", "parquet", "tar") and case.rng.random() < 0.5:
        case.whole = False
        files[0].write_bytes(case.damaged(files[0].read_bytes()))
    task = Task(str(data), text=text, size=8, seed=case.rng.randrange(9))
    batches: Any = task.images(1, 0, image)
    number = len(batches.rows.table)
    by_text = kind not in ("coco", "parquet", "tar", "beside")
    wanted = sum(map(_rows_in, files)) if by_text else len(pairs)
    if kind == "tar":
        wanted = _rows_in_tar(files[0].read_bytes())
    elif kind == "beside":
        wanted = sum(one.cell is not None or one.file.exists() for one in pairs)
    if number > wanted or number + case.counted() < wanted:
        raise RuleError(f"{kind}: {wanted} rows, {number} read; {case.told}")
    if len(task.captions()) != number or not batches.fingerprint:
        raise RuleError(f"{kind}: other captions than rows")
    every: Any = task.images(number, 0, image)
    batch = every[0]
    if every.rows.unreadable and not any("cannot be read" in one for one in case.told):
        raise RuleError(f"{kind}: rows are left out without a word")
    if case.whole:
        shown = [round(float(one[0].mean() + 1) * 127.5 / 25) for one in batch.pixels]
        wrong = [i for i, one in zip(shown, batch.captions, strict=True) if one not in good[i]]
        if wrong or {i for i, texts in enumerate(good) if texts} != set(shown):
            raise RuleError(f"{kind}: rows {sorted(set(shown))} with others' captions: {wrong}")


def _text_table(case: Case, pairs: list[Pair], kind: str) -> tuple[Path, list[Path]]:
    suffix = case.rng.choice([kind, kind.upper()])
    file = case.folder / f"{case.rng.choice(['a', 'train', '[x] b'])}.{suffix}"
    _write(case, file, [{"image": str(one.file), "caption": one.cell} for one in pairs])
    return file, [file]


def _metadata(case: Case, pairs: list[Pair], _: str) -> tuple[Path, list[Path]]:
    file = case.folder / f"data/metadata.{case.rng.choice(['csv', 'jsonl'])}"
    _write(case, file, [{"file_name": one.file.name, "caption": one.cell} for one in pairs])
    return file.parent, [file]


def _beside(case: Case, pairs: list[Pair], _: str) -> tuple[Path, list[Path]]:
    for one in pairs:
        if one.cell is not None:
            file = one.file.with_suffix(case.rng.choice([".txt", ".caption"]))
            file.write_bytes(one.cell.encode())
    return case.folder / "data", []


def _coco(case: Case, pairs: list[Pair], _: str) -> tuple[Path, list[Path]]:
    lists = [one.cell if isinstance(one.cell, list) else [one.cell] for one in pairs]
    table = {
        "images": [{"id": i, "file_name": one.file.name} for i, one in enumerate(pairs)],
        "annotations": [{"image_id": i, "caption": text} for i, cell in enumerate(lists)
                        for text in cell],
    }  # fmt: skip
    file = case.folder / "captions_data.json"
    file.write_text(json.dumps(table))
    return file, [file]


def _parquet(case: Case, pairs: list[Pair], _: str) -> tuple[Path, list[Path]]:
    file = case.folder / "a.parquet"
    inside = case.rng.random() < 0.5
    images = [one.picture if inside else str(one.file) for one in pairs]
    cells = {"image": images, "caption": [one.cell for one in pairs]}
    pyarrow.parquet.write_table(pyarrow.table(cells), file)
    return file, [file]


def _tar(case: Case, pairs: list[Pair], _: str) -> tuple[Path, list[Path]]:
    file = case.folder / "a.tar"
    with tarfile.open(file, "w") as tar:
        for i, one in enumerate(pairs):
            text = None if one.cell is None else one.cell.encode()
            for name, content in ((f"{i}.png", one.picture), (f"{i}.txt", text)):
                if content is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return file, [file]


def _rows_in_tar(content: bytes) -> int:
    """A hole of zeros up to its end is no damage: a tar does not say how long it is."""
    at, stems = 0, set()
    while content[at : at + 512].strip(b"\0"):
        stems.add(content[at : at + 100].partition(b".")[0])
        at += 512 * (1 + (int(content[at + 124 : at + 135], 8) + 511) // 512)
    return len(stems)


FORMS = {
    **dict.fromkeys(("csv", "tsv", "json", "jsonl"), _text_table),
    "metadata": _metadata, "beside": _beside, "coco": _coco, "parquet": _parquet, "tar": _tar,
}  # fmt: skip
"""What writes a table's files: the path to open, and those of the rows."""


def images(case: Case) -> None:
    """A picture is read whole, in RGB and upright, or refused."""
    rng = case.rng
    mode = rng.choice(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "LAB", "YCbCr"])
    size = rng.choice([1, 2, 3, 17, 40]), rng.choice([1, 2, 5, 33])
    noise = Image.frombytes("RGBA", size, rng.randbytes(4 * size[0] * size[1]))
    image = noise.convert("RGB").convert("L" if mode == "I;16" else "RGB")
    image = image.convert(mode) if mode != "LAB" else Image.frombytes("LAB", size, image.tobytes())
    kind = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "DDS",
                       "TGA", "PPM"])  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(10)  # how it is turned
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = rng.choice([profile, case.damaged(profile), b""])
    out = io.BytesIO()
    more: dict[str, Any] = rng.choice([{}, {"exif": exif}, {"icc_profile": profile}])
    more |= {"lossless": True} if kind == "WEBP" else {}
    try:
        image.save(out, kind, **more)
    except (OSError, ValueError, KeyError, SystemError):
        return  # the format has no such mode
    content = original = out.getvalue()
    case.whole = rng.random() < 0.4
    if not case.whole:
        content = case.damaged(content)
    file = case.folder / f"a.{rng.choice(['png', 'jpg', 'avif', 'dds', 'txt', kind.lower()])}"
    file.write_bytes(content)
    found = read_picture(file)
    if found.mode != "RGB" or found.tobytes() != read_picture(content).tobytes():
        raise RuleError(f"{kind} {mode}: mode {found.mode}, or another picture of the same bytes")
    if case.whole and sorted(found.size) != sorted(size):
        raise RuleError(f"{kind} {mode}: expected {size}, got {found.size}")
    if len(content) < 0.8 * len(original) and original.startswith(content):
        whole = read_picture(original)
        if whole.tobytes() != found.tobytes():
            raise RuleError(f"{kind} {mode}: {len(content)} of {len(original)} bytes are a picture")
    if read_image(str(file), 8).shape != (8, 8, 3):
        raise RuleError(f"{kind} {mode}: not fitted")


@cache
def _trained() -> tuple[Path, Any, RunState]:
    """A run's folder, its options, and what loads its checkpoints."""
    from accelerate import Accelerator

    import train_agsm
    from data.task import open_task
    from model.session import Session
    from run.log import Log

    folder = Path(_HOME.name, "run")
    given = f"--output_dir {folder} --max_train_steps 2 --checkpointing_steps 1 --rank 1 "
    given += f"--num_tokens 1 --neg_scale 0 --train_batch_size 2 --model {MODEL} "
    given += "--validation_per_category 1 --validation_inference_steps 1"
    with redirect_stdout(io.StringIO()):
        train_agsm.main(given.split())
    shutil.rmtree(folder / "sheets", ignore_errors=True)
    options = train_agsm.OPTIONS.parse("", [*given.split(), "--resume_from_checkpoint", "latest"])
    accelerator = Accelerator()
    task = open_task(options, accelerator)
    model = Session(options, accelerator, task, method="").prepare(accelerator)
    others = {
        "schedule": torch.optim.lr_scheduler.LambdaLR(model.optimizer, lambda at: 1.0),
        "log": Log(folder / "log.jsonl"),
        "averages": train_agsm.make_objective(options, model),
    }
    state = RunState(accelerator, model.module, model.optimizer, others)
    return folder, options, state


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def checkpoints(case: Case) -> None:
    """A checkpoint is loaded as it was saved, or the one before, or none with a message."""
    rng, (made, options, state) = case.rng, _trained()
    run = case.folder / "run"
    shutil.copytree(made, run)
    file = rng.choice(sorted(one for one in run.rglob("*") if one.is_file()))
    forged = file.suffix in (".bin", ".pkl", ".safetensors", ".pt") and rng.random() < 0.7
    content, ways = case.damaged(file.read_bytes()), ["damage", "remove", "folder", "pickle"]
    way = rng.choice(["nothing", *ways] if not forged else ["damage", "pickle"])
    case.whole = way == "nothing"
    if way == "pickle":
        others: list[Any] = [Evil(case.folder / "evil"), None, [], {}, {"state": 7}]
        content = pickle.dumps(rng.choice(others))
    if way in ("remove", "folder"):
        file.unlink()
    if way == "folder":
        file.mkdir()
    if way in ("damage", "pickle"):
        file.write_bytes(content)
    marker = file.parent / "complete"
    if forged and marker.exists():
        told = json.loads(marker.read_text())
        told["sha256"][file.name] = digest_of(file)
        marker.write_text(json.dumps(told))
    part = file.relative_to(run).parts[0]
    try:
        if part in ("lora", "tokens"):
            _load_part(part, run / part)
            return
        options.output_dir = str(run)
        with opened(options, state.accelerator, {}) as found:
            if found is None:
                if not any("anew" in one for one in case.told):
                    raise RuleError(f"{file.name}: the run starts anew without a word")
                return
            state.load(found.folder)
            saved = load_file(made / f"checkpoints/checkpoint_{found.step}/trainable.safetensors")
            own = state.parts()["weights"]
            if not forged and any(not torch.equal(own[name], one) for name, one in saved.items()):
                raise RuleError(f"{file.name}: other weights than were saved")
            if found.step < 2 and not case.told:
                raise RuleError(f"{file.name}: an older checkpoint without a word")
    finally:
        if (case.folder / "evil").exists():
            raise RuleError(f"{file.name}: its code was run")
        if forged:
            state.load(made / "checkpoints/checkpoint_2")


def _load_part(part: str, folder: Path) -> None:
    model = _model()
    if part == "tokens":
        load_soft_tokens(model.pipe, str(folder)).detach()
        return
    try:
        model.load_extras("", str(folder))
    finally:
        model.pipe.unload_lora_weights()


def models(case: Case) -> None:
    """A pipeline with a damaged file is loaded or refused."""
    folder = case.folder / "model"
    shutil.copytree(MODEL, folder, copy_function=os.symlink)
    file = case.rng.choice(sorted(one for one in folder.rglob("*") if one.is_symlink()))
    content = case.damaged(file.read_bytes())
    file.unlink()
    if case.rng.random() < 0.8:
        file.write_bytes(content)
    TextToImage.load(str(folder), torch.float32).encode_text(["two red circles"])


KINDS = {one.__name__: one for one in (captions, tables, prompts, images, checkpoints, models)}
_HOME = TemporaryDirectory(prefix="fuzz")


def is_ours(error: BaseException) -> bool:
    """Raised by a line of the recipes or the library, as a value or a file that is not right."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    file = at.tb_frame.f_code.co_filename if at is not None else ""
    line = linecache.getline(file, at.tb_lineno).strip() if at is not None else ""
    own = Path(file).is_relative_to(ROOT) and line.startswith("raise") and file != __file__
    return own and isinstance(error, ValueError | OSError) and "\n" not in str(error)


class _Told(logging.Handler):
    case: Case | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.case is not None:
            self.case.told.append(record.getMessage())


@contextmanager
def _limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    timers = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF}
    before = {number: signal.signal(number, late) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def attempt(seed: int, kind: str, number: int) -> tuple[str, BaseException | None]:
    """("read" or "refused", the refusal), or ("failed", the error)."""
    told = _Told(logging.WARNING)
    logging.getLogger().addHandler(told)
    home = Path(_HOME.name, f"{kind}_{number}")
    home.mkdir()
    told.case = case = Case(random.Random(f"{seed} {kind} {number}"), home)
    datasets.config.HF_DATASETS_CACHE = home / "cache"
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind](case)
        return "read", None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return ("refused" if is_ours(error) and not case.whole else "failed"), error
    finally:
        logging.getLogger().removeHandler(told)
        shutil.rmtree(home, ignore_errors=True)


def quiet() -> None:
    """Without the libraries' messages, of which there are thousands."""
    quiet_libraries()
    datasets.disable_progress_bars()
    for name in ("transformers", "diffusers"):  # captions that are cut, weights that are missing
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: list[str] | None = None) -> int:
    """Prints what was tried of each kind; returns the number of failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="time to try in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", default="", metavar="KIND:NUMBER", help="one case alone")
    given = parser.parse_args(arguments)
    quiet()
    if given.repeat:
        kind, _, number = given.repeat.partition(":")
        outcome, error = attempt(given.seed, kind, int(number))
        print(outcome)
        if error is not None:
            traceback.print_exception(error)
        return int(outcome == "failed")
    end, spent = time.time() + given.seconds, dict.fromkeys(KINDS, 0.0)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    while time.time() < end:
        kind = min(spent, key=spent.__getitem__)  # each kind gets the same time
        number, began = counts[kind].total(), time.time()
        outcome, error = attempt(given.seed, kind, number)
        spent[kind] += time.time() - began
        counts[kind][outcome] += 1
        if outcome == "failed":
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"failed: --seed {given.seed} --repeat {kind}:{number}  {text:.300}", flush=True)
    for kind, found in counts.items():
        print(f"{kind}: {found.total():,} cases, {found['read']:,} read, {found['refused']:,} "
              f"refused, {found['failed']:,} failed")  # fmt: skip
    return sum(found["failed"] for found in counts.values())


if __name__ == "__main__":
    raise SystemExit(bool(main()))
