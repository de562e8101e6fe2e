"""`--precompute`: the same numbers, no encoder in the loop, a cache that survives its writers."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from pipelines_tiny import speaking_pipeline
from recipe_runs import log, trained
from safetensors.torch import load_file, save, save_file

import train_agsm
import train_dpo
from agsm_loss.integrations.prompts import Family
from data.batches import Batch
from lab.world.export import captioned, preferences
from model import precompute as module
from model.pipeline import TextToImage
from model.precompute import Store, image_identity, precompute, text_identity

FEW = ["--resolution", "8", "--max_train_steps", "3", "--train_batch_size", "3",
       "--candidates", "empty,in_batch:1,hard:1", "--logging_steps", "1",
       "--num_tokens", "1", "--checkpointing_steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines with a VAE that is random, by name."""
    return {n: speaking_pipeline(n, tmp_path_factory.mktemp(n)) for n in ("unet", "sd3", "qwen")}


@pytest.fixture
def model(folders):
    return TextToImage.load(str(folders["sd3"]), torch.float32)


def counts(capsys):
    """Entries found and made, of the line that a run prints."""
    found = re.search(r"Precomputed: (\S+) entries found, (\S+) made; (\S+): \S+ GB",
                      capsys.readouterr().out)  # fmt: skip
    return int(found[1]), int(found[2])


def shapes(seed, number=3):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(number, 3, 8, 8, generator=generator) * 2 - 1
    captions = [f"a red circle {seed} {i}" for i in range(number)]
    return Batch(pixels, captions, list(range(number)), [[f"two {text}"] for text in captions])


@pytest.mark.parametrize("kind", ["unet", "sd3", "qwen"])
def test_a_run_has_the_same_numbers_with_and_without(folders, tmp_path, kind, capsys, monkeypatch):
    captioned(6, seed=0).to_parquet(tmp_path / "w.parquet")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = ["--model", str(folders[kind]), "--data", str(tmp_path / "w.parquet"), *FEW,
             "--validation_prompts", str(tmp_path / "prompts.txt"),
             "--validation_inference_steps", "2"]  # fmt: skip
    monkeypatch.setattr("model.pipeline.call_of", lambda pipe: {"height": 16, "width": 16})
    train_agsm.main([*flags, "--output_dir", str(tmp_path / "without")])
    cached = [*flags, "--precompute", str(tmp_path / "cache")]
    train_agsm.main([*cached, "--output_dir", str(tmp_path / "first")])
    found, made = counts(capsys)
    assert found == 0 and made > 6
    encoded = []
    monkeypatch.setattr(Family, "encode", lambda self, *given: encoded.append(given))
    monkeypatch.setattr(module, "save_file", lambda *given: encoded.append(given))
    if kind != "unet":  # a UNet's tokens begin from the empty prompt's embedding
        train_agsm.main([*cached, "--output_dir", str(tmp_path / "second")])
        assert counts(capsys) == (made, 0) and not encoded
    for name in ("first", "second") if kind != "unet" else ("first",):
        assert log(tmp_path / name) == log(tmp_path / "without")
        want, got = trained(tmp_path / "without"), trained(tmp_path / name)
        assert want and all(torch.equal(want[one], got[one]) for one in want)


def test_preference_pairs_too(folders, tmp_path, capsys):
    preferences(6, seed=0).to_parquet(tmp_path / "w.parquet")
    flags = ["--model", str(folders["unet"]), "--data", str(tmp_path / "w.parquet"), *FEW,
             "--agsm_weight", "1", "--rank", "1", "--num_tokens", "0"]  # fmt: skip
    train_dpo.main([*flags, "--output_dir", str(tmp_path / "without")])
    cached = [*flags, "--precompute", str(tmp_path / "cache")]
    train_dpo.main([*cached, "--output_dir", str(tmp_path / "with")])
    assert counts(capsys)[1] > 12
    assert log(tmp_path / "with") == log(tmp_path / "without")
    want, got = trained(tmp_path / "without"), trained(tmp_path / "with")
    assert want and all(torch.equal(want[one], got[one]) for one in want)


def test_the_encoders_are_off_the_device_but_for_validation_and_misses(model, tmp_path):
    fill = precompute(str(tmp_path), model, Accelerator())
    moves = []
    model._move_encoders = moves.append
    fill(iter([(0, shapes(0))]), 1)
    assert moves == ["cpu"]
    model.encode_prompts(shapes(0).captions)
    model.encode_images(shapes(0).pixels)
    assert moves == ["cpu"]
    with model.loaded():
        assert moves == ["cpu", model.device]
    assert moves == ["cpu", model.device, "cpu"]
    model.encode_prompts(["a cat"])
    assert moves[3:] == [model.device, "cpu"]
    assert len(list(tmp_path.glob("text-*/*.safetensors"))) == 2  # kept at once


def test_what_encodes_is_part_of_the_key(folders, model):
    def identities(change):
        other = TextToImage.load(str(folders["sd3"]), torch.float32)
        change(other)
        return text_identity(other), image_identity(other)

    def nudge(part):
        next(part.parameters()).data.view(-1)[0] += 1e-3

    def told(other):
        other.arguments["max_sequence_length"] = 3

    same = text_identity(model), image_identity(model)
    model.encode_prompts(["a red circle"])
    assert same == (text_identity(model), image_identity(model))
    assert same == identities(lambda other: None)
    assert same == identities(lambda other: nudge(other.denoiser))
    for part, changed in (("text_encoder", 0), ("text_encoder_3", 0), ("vae", 1)):
        for change in (
            lambda other, part=part: nudge(getattr(other.pipe, part)),
            lambda other, part=part: getattr(other.pipe, part).to(torch.bfloat16),
        ):
            got = identities(change)
            assert got[changed] != same[changed] and got[1 - changed] == same[1 - changed]
    for change in (told, lambda other: other.pipe.tokenizer.add_tokens(["red"])):
        got = identities(change)
        assert got[0] != same[0] and got[1] == same[1]


def test_an_image_of_another_size_or_a_changed_pixel_is_a_miss(model, tmp_path):
    precompute(str(tmp_path), model, Accelerator())
    images, pixels = model.image_rows, shapes(0, 1).pixels
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 1e-6
    for number, some in enumerate((pixels, changed, pixels.reshape(1, 3, 4, 16), pixels.double())):
        images(some)
        assert images.made == number + 1
    images(pixels)
    assert images.made == 4 and images.found == 0


class Killed(BaseException):
    """Ends a writer in the middle of a file."""


def test_a_killed_writer_leaves_whole_files_and_is_continued(model, tmp_path, capsys, monkeypatch):
    written = []

    def half(tensors, file, hashes):
        written.append(file)
        if len(written) < 5:  # the dead write no more
            data = save(tensors, hashes)
            file.write_bytes(data if len(written) < 4 else data[: len(data) // 2])
        if len(written) >= 4:
            raise Killed

    plain = TextToImage(model.pipe)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_file", half)
        patch.setattr(module, "FILE_BYTES", 1)
        fill = precompute(str(tmp_path), TextToImage(model.pipe), Accelerator())
        fill(iter([(i, shapes(i)) for i in range(5)]), 5)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 3 and len(list(tmp_path.rglob("*.part"))) == 1
    precompute(str(tmp_path), model, Accelerator())(iter((i, shapes(i)) for i in range(5)), 5)
    found, made = counts(capsys)
    assert found > 0 and found + made == 5 * 9 + 1
    for batch in map(shapes, range(5)):
        for name, value in plain.encode_prompts(batch.captions).items():
            assert torch.equal(value, model.encode_prompts(batch.captions)[name])
        want, got = (
            one.encode_images(batch.pixels, torch.Generator().manual_seed(0))
            for one in (plain, model)
        )
        assert torch.equal(want, got)


@pytest.mark.parametrize("left", [0, 5, 0.5])
def test_a_truncated_file_is_named_and_made_again(model, tmp_path, left, caplog, capsys):
    def fill():
        model.text_rows, model.image_rows = model._text_rows, model._image_rows
        precompute(str(tmp_path), model, Accelerator())(iter([(0, shapes(0))]), 1)
        return counts(capsys)

    assert fill() == (0, 10)
    file = next(tmp_path.glob("images-*/*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[: left if isinstance(left, int) else int(left * len(data))])
    assert fill() == (7, 3) and str(file) in caplog.text
    assert not file.exists() and fill() == (10, 0)


@pytest.mark.parametrize("place", [-1, -100, 30, 60])
def test_a_flipped_bit_is_noticed_and_made_again(model, tmp_path, place, caplog, capsys):
    """In a tensor, and in the header: of a name, a kind or a hash."""
    plain = TextToImage(model.pipe)

    def fill():
        model.text_rows, model.image_rows = model._text_rows, model._image_rows
        model._cache.clear()
        precompute(str(tmp_path), model, Accelerator())(iter([(0, shapes(0))]), 1)
        return counts(capsys)

    assert fill() == (0, 10)
    for kind in ("text", "images"):
        file = next(tmp_path.glob(f"{kind}-*/*.safetensors"))
        data = bytearray(file.read_bytes())
        data[place] ^= 4
        file.write_bytes(data)
    found, made = fill()
    assert found + made == 10 and made >= 2
    for name, value in plain.encode_prompts(shapes(0).captions).items():
        assert torch.equal(value, model.encode_prompts(shapes(0).captions)[name])
    want, got = (one.image_rows(shapes(0).pixels) for one in (plain, model))
    assert all(torch.equal(w[n], g[n]) for w, g in zip(want, got, strict=True) for n in w)


def test_an_entry_with_a_tensor_missing_is_made_again(tmp_path):
    row = {"mean": torch.ones(2), "std": torch.ones(2)}
    store = Store(tmp_path)
    store["a"] = row
    store["b"] = row
    store.save()
    file = next(tmp_path.glob("*.safetensors"))
    with module.safe_open(file, "pt") as opened:
        hashes = opened.metadata()
    save_file({n: v for n, v in load_file(file).items() if n != "a.std"}, file, hashes)
    store = Store(tmp_path)
    assert "a" not in store and store["b"].keys() == row.keys()
    assert "b" not in Store(tmp_path)  # the file is put aside


def test_what_is_damaged_in_a_run_is_encoded_again(model, tmp_path, monkeypatch):
    precompute(str(tmp_path), model, Accelerator())(iter([(0, shapes(0))]), 1)
    want = model.image_rows(shapes(0).pixels)
    store = model.image_rows.store
    for key, (path, names, _) in store._rows.items():
        store._rows[key] = path, names, "another"
    got = model.image_rows(shapes(0).pixels)
    assert all(torch.equal(w[n], g[n]) for w, g in zip(want, got, strict=True) for n in w)
    assert model.image_rows.made == 6


def test_the_strength_of_a_loras_is_part_of_the_key(folders):
    """Of one that is not merged into the weights: it is no tensor."""
    model = TextToImage.load(str(folders["unet"]), torch.float32)
    model.pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]))
    first = text_identity(model)
    assert text_identity(model) == first
    for layer in model.pipe.text_encoder.modules():
        if hasattr(layer, "scaling"):
            layer.set_scale("default", 0.5)
    second = text_identity(model)
    model.pipe.text_encoder.disable_adapters()
    assert len({first, second, text_identity(model)}) == 3


def test_two_writers_share_a_folder(tmp_path):
    row = {"mean": torch.randn(2, 3), "std": torch.randn(3).bfloat16()}
    one, other = Store(tmp_path), Store(tmp_path)
    one["a"], other["b"] = row, row
    other["a"] = row  # by both
    one.save()
    assert "a" in one and "b" not in one
    other.save()
    one.save()  # finds the other's
    for store in (one, other, Store(tmp_path)):
        for key in "ab":
            assert all(torch.equal(store[key][name], value) for name, value in row.items())
            assert store[key].keys() == row.keys()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise module.SafetensorError("I/O error: No space left on device (os error 28)")

    store = Store(tmp_path)
    store["a"] = {"mean": torch.ones(2)}
    monkeypatch.setattr(module, "save_file", fail)
    told = rf"^{tmp_path}: .*could not be written: .*No space left.* Make room on the disk, then"
    with pytest.raises(OSError, match=told):
        store.save()
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    store.save()
    assert "a" in Store(tmp_path)


def test_files_that_killed_writers_left_are_removed_after_an_hour(tmp_path):
    import os

    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    Store(tmp_path)
    assert not old.exists() and new.exists()


def test_files_hold_a_limited_number_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    store = Store(Path(tmp_path))
    for number in range(10):
        store[str(number)] = {"mean": torch.zeros(10)}
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert all(str(number) in store for number in range(10))
