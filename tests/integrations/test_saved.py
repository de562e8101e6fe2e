"""Save, load, import: the same tokens back, and nothing else let in."""

import ast
import json
import os
import pickle
from functools import partial
from random import Random

import pytest
import torch
from huggingface_hub import ModelCard
from integrations_tiny import NAMES, tiny
from integrations_tiny import run as predicted
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map_only

from agsm_loss import Bank, SoftTokens
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens
from agsm_loss.integrations.tokens.saved import SavedTokens, import_agsm, import_softrepa


def attached_to(name, **settings):
    made = tiny(name, torch.float32)
    return made, attach_soft_tokens(made.model, make_soft_tokens(made.model, std=1.0), **settings)


def inputs(made):
    return tree_map_only(
        torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, made.inputs()
    )


def run(made, attached, bank):
    with torch.no_grad(), attached.using(bank):
        return predicted(made.model, **inputs(made))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_bit_for_bit(name, tmp_path):
    made, attached = attached_to(name, **({"blocks": ("mid", "up")} if "unet" in name else {}))
    before = {bank: run(made, attached, bank) for bank in Bank}
    saved = SavedTokens.of(attached, base_model="org/base", training={"lr": 1e-3})
    saved.save_pretrained(tmp_path)
    attached.detach()
    loaded = SavedTokens.from_pretrained(tmp_path)
    assert loaded.config() == saved.config()
    again = loaded.attach(made.model)
    for bank in Bank:
        assert torch.equal(run(made, again, bank), before[bank])
    again.detach()


@pytest.mark.unchecked_shapes
def test_what_is_in_the_folder(tmp_path):
    _, attached = attached_to("sd3")
    for wrong in ({1: 2}, {"data": tmp_path}):
        with pytest.raises(TypeError, match="training: expected"):
            SavedTokens.of(attached, training=wrong).save_pretrained(f"{tmp_path}_wrong")
    SavedTokens.of(attached, base_model="org/base", training={"lr": 0.5}).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone"] == "SD3Transformer2DModel" and config["training"] == {"lr": 0.5}
    assert config["tokens"]["num_layers"] == 3 and config["tokens"]["dim"] == 24
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/base" in card and "SD3Transformer2DModel" in card
    assert 'pipe = DiffusionPipeline.from_pretrained("org/base")' in card
    assert "| lr | `0.5` |" in card
    local = tmp_path / "local"
    SavedTokens.of(attached, base_model=str(tmp_path)).save_pretrained(local)
    assert "base_model:" not in (local / "README.md").read_text()  # the hub takes ids alone


@pytest.mark.parametrize(
    "name",
    ["a: [b", "x\nlicense: {", "---\n---\n", "`x`\n# Heading", 'say "hi"', "{count}", "\0",
     "\ud800", "a/b/c", "x" * 5000, "null", "owner/1.0", " "],
)  # fmt: skip
def test_any_base_model_is_saved_and_leaves_the_card_whole(name, tmp_path):
    saved = SavedTokens(SoftTokens(4), "SD3Transformer2DModel", None, name, {name: name})
    saved.save_pretrained(tmp_path)
    assert SavedTokens.from_pretrained(tmp_path).base_model == name
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "agsm-loss" and card.data.license is None
    assert card.data.base_model == (name if name in ("null", "owner/1.0") else None)
    assert [line for line in card.text.split("\n") if line.startswith("# ")] == [
        "# Soft tokens for SD3Transformer2DModel"
    ]
    code = card.text.split("```python\n")[1].split("```")[0]
    called = [one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Call)]
    loaded = [one.args[0].value for one in called
              if getattr(one.func, "attr", "") == "from_pretrained"]  # fmt: skip
    assert loaded == [name]


@pytest.mark.parametrize("banks", ["shared", "positive_only"])
def test_ablations_round_trip(banks, tmp_path):
    made = tiny("sd3", torch.float32)
    tokens = make_soft_tokens(made.model, banks=banks, time_buckets=None)
    SavedTokens(tokens, "SD3Transformer2DModel").save_pretrained(tmp_path)
    loaded = SavedTokens.from_pretrained(tmp_path).tokens
    for bank in (0, 1):
        assert torch.equal(loaded(None, bank), tokens(None, bank))


def untouched(made, call, error, text):
    """The call fails with the text; the model computes what it did, and takes tokens."""
    bare = made.model(**inputs(made))[0]
    with pytest.raises(error, match=text):
        call()
    assert torch.equal(made.model(**inputs(made))[0], bare)
    attach_soft_tokens(made.model, make_soft_tokens(made.model)).detach()


def test_damaged_folders(tmp_path):
    made, attached = attached_to("sd3")
    SavedTokens.of(attached).save_pretrained(tmp_path)
    attached.detach()

    def load():
        SavedTokens.from_pretrained(tmp_path).attach(made.model)

    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, good = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    untouched(made, load, ValueError, "damaged or not safetensors")
    weights.write_bytes(whole)
    good["tokens"]["num_layers"] = 2
    config.write_text(json.dumps(good))
    untouched(made, load, ValueError, r"expected tensors .*\(2, 2, 4, 24\).*\(2, 3, 4, 24\)")
    config.write_text(json.dumps(good | {"format_version": 99}))
    untouched(made, load, ValueError, "format_version 1, got 99. Upgrade")
    config.write_text("{")
    untouched(made, load, ValueError, "not a config of soft tokens")
    config.write_text(json.dumps(good))
    weights.unlink()
    untouched(made, load, FileNotFoundError, "found no model.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Saved tokens of a UNet."""
    tokens = SoftTokens(8, num_layers=2, time_buckets=3)
    SavedTokens(tokens, "UNet2DConditionModel", ("mid",)).save_pretrained(tmp_path)
    return tmp_path


def test_sizes_are_compared_before_anything_is_allocated(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(torch, "randn", lambda shape: pytest.fail(f"{shape} were allocated"))
    for changes in ({"num_tokens": 10**9}, {"dim": 2**31 - 1, "num_layers": 2**31 - 1}):
        told = config | {"tokens": config["tokens"] | changes}
        (folder / "config.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=r"model.safetensors: expected tensors .*got .*8\)"):
            SavedTokens.from_pretrained(folder)
    extra = {"tokens": config["tokens"] | {"std": 1.0}}
    (folder / "config.json").write_text(json.dumps(config | extra))
    with pytest.raises(ValueError, match=r"config.json: tokens: unknown keys .*'std'"):
        SavedTokens.from_pretrained(folder)


ODD = (None, True, 0, -1, 1.5, 1e9, 10**30, "dual", "", [], ["down", []], {}, {"a": 1})
FINE = {
    "backbone": ("dual", ""),
    "blocks": (None, []),  # attaching checks the names
    "base_model": (None, "dual", ""),
    "training": ({}, {"a": 1}),
    "tokens.banks": ("dual",),
}


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("key", ["backbone", "blocks", "base_model", "training", "tokens",
    "tokens.dim", "tokens.num_tokens", "tokens.num_layers", "tokens.banks", "tokens.time_buckets",
    "tokens.num_train_timesteps"])  # fmt: skip
def test_odd_configs_are_named(key, folder):
    *parents, name = key.split(".")
    good = (folder / "config.json").read_text()
    for odd in (*ODD, ...):
        config = json.loads(good)
        table = config["tokens"] if parents else config
        table[name] = odd
        if odd is ...:
            del table[name]
        (folder / "config.json").write_text(json.dumps(config))
        if any(odd == fine and type(odd) is type(fine) for fine in FINE.get(key, ())):
            SavedTokens.from_pretrained(folder)
        else:
            with pytest.raises(ValueError, match=rf"{folder}.*\.(json|safetensors): "):
                SavedTokens.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "null", "3", '"format_version"', "{}",
    "[" * 10**5, "\ud800", '{"format_version": "1"}'])  # fmt: skip
def test_configs_that_are_no_table_of_ours(text, folder):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(
        ValueError, match=r"config.json: (not a config of|expected format_version 1)"
    ):
        SavedTokens.from_pretrained(folder)


def test_weights_that_are_no_finite_numbers(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    for bad, text in (
        (torch.nan, "tokens: expected finite numbers, got 1 of 128 that are NaN"),
        (torch.inf, "tokens: expected finite numbers, got 1 of 128"),
    ):
        tokens = good["tokens"].clone()
        tokens[1, 0, 2, 3] = bad
        save_file(good | {"tokens": tokens}, path)
        with pytest.raises(ValueError, match=rf"model.safetensors: {text}"):
            SavedTokens.from_pretrained(folder)
    for dtype in (torch.complex64, torch.int64, torch.bool):
        save_file({name: value.to(dtype) for name, value in good.items()}, path)
        with pytest.raises(ValueError, match=r"model.safetensors: expected .*'F32'.*got .* of \["):
            SavedTokens.from_pretrained(folder)
    save_file({name: value.half() for name, value in good.items()}, path)
    tokens = SavedTokens.from_pretrained(folder).tokens
    assert torch.equal(tokens.tokens, good["tokens"].half().float()) and tokens.tokens.requires_grad


def mutated(data, rng):
    """Cut, changed, shortened or lengthened at 1 to 8 places."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        at, some = rng.randrange(len(data) + 1), rng.randbytes(rng.randrange(1, 20))
        how = rng.randrange(4)
        data[at : [None, at + len(some), at + len(some), at][how]] = [b"", some, b"", some][how]
    return bytes(data)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("kind", ["config", "safetensors", "pth", "legacy pth", "embedding"])
@pytest.mark.filterwarnings("ignore:Defining your `__torch_function__`")
def test_mutated_files_are_whole_or_a_value_error_with_their_name(kind, folder):
    torch.save(torch.randn(2, 2, 4, 8), folder / "base.pth")
    path, read = folder / "tokens.pth", import_agsm
    if kind == "embedding":
        torch.save(nn.Embedding(3, 16), path)
        read = partial(import_agsm, folder / "base.pth")
    elif "pth" in kind:
        new = kind == "pth"
        torch.save(torch.randn(2, 2, 4, 8), path, _use_new_zipfile_serialization=new)
    else:
        path = folder / {"config": "config.json", "safetensors": "model.safetensors"}[kind]
        read = lambda path: SavedTokens.from_pretrained(path.parent)
    whole, refused = path.read_bytes(), 0
    read(path)
    for seed in range(300):
        path.write_bytes(mutated(whole, Random(seed)))
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error), seed
            refused += 1
    assert refused > 150  # a changed number is not seen


def test_the_wrong_model():
    made = tiny("sd3", torch.float32)
    for saved, text in (
        (SavedTokens(SoftTokens(24), "UNet2DConditionModel"), "a UNet2DConditionModel, got a SD3"),
        (SavedTokens(SoftTokens(32, num_layers=2), "SD3Transformer2DModel"), "dim=24.*dim=32"),
        (SavedTokens(SoftTokens(24, num_layers=9), "SD3Transformer2DModel"), "1..3.*num_layers=9"),
    ):
        untouched(made, lambda saved=saved: saved.attach(made.model), ValueError, text)


@pytest.mark.parametrize(("layers", "dim"), [((), 16), ((5,), 24)])
def test_released_agsm_files(layers, dim, tmp_path):
    base = nn.Parameter(torch.randn(2, *layers, 4, dim))
    time = nn.Embedding(100, (layers or (1,))[0] * dim)
    torch.save(base, tmp_path / "soft_tokens.pth")
    torch.save(time, tmp_path / "soft_t_tokens.pth")
    tokens = import_agsm(tmp_path / "soft_tokens.pth", tmp_path / "soft_t_tokens.pth")
    assert torch.equal(tokens.tokens, base) and tokens.banks == "dual"
    own = tokens(torch.tensor([427]), Bank.NEGATIVE)[0]
    expected = base[1] + time.weight[42].reshape(*layers, 1, dim)
    torch.testing.assert_close(own, expected)
    assert import_agsm(tmp_path / "soft_tokens.pth").time_tokens is None


@pytest.mark.parametrize("layers", [(), (5,)])
def test_released_softrepa_files(layers, tmp_path):
    base = torch.randn(*layers, 4, 16)
    time = nn.Embedding(100, (layers or (1,))[0] * 16)
    torch.save(nn.Parameter(base), tmp_path / "dc_tokens.pth")
    torch.save(time, tmp_path / "dc_t_tokens.pth")
    tokens = import_softrepa(tmp_path / "dc_tokens.pth", tmp_path / "dc_t_tokens.pth")
    t = torch.tensor([0.0])
    assert torch.equal(tokens(t, Bank.POSITIVE), tokens(t, Bank.NEGATIVE))
    torch.testing.assert_close(tokens(t)[0], base + time.weight[0].reshape(*layers, 1, 16))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_other_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "soft_tokens.pth"
    for value in (Malicious(), {"tokens": Malicious()}, nn.Linear(2, 2)):
        torch.save(value, path)
        for reader in (import_agsm, import_softrepa):
            with pytest.raises(ValueError, match="refused"):
                reader(path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        import_agsm(path)
    assert not (tmp_path / "pwned").exists()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="refused"):
        import_agsm(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="got list"):
        import_agsm(path)
    torch.save(torch.zeros(4, 8), path)
    with pytest.raises(ValueError, match=r"expected shape \(2, n, d\).*import_softrepa"):
        import_agsm(path)
    torch.save(torch.zeros(2, 2, 4, 8), path)
    with pytest.raises(ValueError, match=r"expected shape \(n, d\).*import_agsm"):
        import_softrepa(path)
    torch.save(nn.Embedding(100, 7), tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"embedding \(buckets, 16\).*\(100, 7\)"):
        import_agsm(path, tmp_path / "t.pth")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11, at a load
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.full((2, 4, 8), torch.nan), "expected finite numbers, got 64 of 64"),
        (torch.zeros(2, 4, 8, dtype=torch.complex64), "expected a floating-point tensor"),
        (torch.zeros(2, 4, 8, dtype=torch.long), "floating-point tensor"),
        (torch.zeros(2, 4, 8).to_sparse(), "floating-point tensor"),
        (torch.zeros(2, 4, 8, device="meta"), "floating-point tensor"),
        (torch.zeros(2, 0, 8), r"floating-point tensor .* \(2, 0, 8\)"),
        (torch.zeros(1).expand(2, 4, 10**6), "stored as a whole"),  # 32 MB in a file of 1 kB
    ],
)
def test_odd_tensors_are_refused(value, text, tmp_path):
    path = tmp_path / "soft_tokens.pth"
    torch.save(value, path)
    with pytest.raises(ValueError, match=rf"(?i)soft_tokens.pth: .*{text}"):
        import_agsm(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="disk cache") as raised:
        SavedTokens.from_pretrained("org/nothing", local_files_only=True, cache_dir=tmp_path)
    assert "not soft tokens" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        import_agsm(tmp_path / "gone.pth")


def test_softrepa_tokens_of_the_text_encoders_width(tmp_path):
    """Its transformer: context_embedder(tokens) + time tokens, before the text of each block."""
    path, time_path = tmp_path / "dc_tokens.pth", tmp_path / "dc_t_tokens.pth"
    base, time, embedder = torch.randn(3, 4, 4096), nn.Embedding(100, 3 * 24), nn.Linear(4096, 24)
    torch.save(nn.Parameter(base), path)
    torch.save(time, time_path)
    for given in ((path,), (path, time_path)):
        with pytest.raises(
            ValueError, match=r"dc_tokens\.pth: .*4096 wide, go through.*Pass context_"
        ):
            import_softrepa(*given)
    tokens = import_softrepa(path, time_path, context_embedder=embedder)
    own = tokens(torch.tensor([427]))[0]
    for layer, part in enumerate(time(torch.tensor(42)).chunk(3)):
        torch.testing.assert_close(own[layer], embedder(base[layer]) + part)
    with pytest.raises(
        ValueError, match="expected tokens 16 wide for this context_embedder, got 4096"
    ):
        import_softrepa(path, time_path, context_embedder=nn.Linear(16, 24))
