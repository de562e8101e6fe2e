"""Save, load, import: the same tokens back, and nothing else let in."""

import json
import os
import pickle

import pytest
import torch
from integrations_tiny import NAMES, tiny
from torch import nn

from agsm_loss import Bank, SoftTokens
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens
from agsm_loss.integrations.tokens.saved import SavedTokens, import_agsm, import_softrepa


def attached_to(name, **settings):
    made = tiny(name, torch.float32)
    return made, attach_soft_tokens(made.model, make_soft_tokens(made.model, std=1.0), **settings)


def inputs(made):
    return {
        n: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in made.inputs().items()
    }


def run(made, attached, bank):
    with torch.no_grad(), attached.using(bank):
        return made.model(**inputs(made))[0]


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


def test_what_is_in_the_folder(tmp_path):
    _, attached = attached_to("sd3")
    SavedTokens.of(attached, base_model="org/base", training={"lr": 0.5}).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone"] == "SD3Transformer2DModel" and config["training"] == {"lr": 0.5}
    assert config["tokens"]["num_layers"] == 3 and config["tokens"]["dim"] == 24
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/base" in card and "SD3Transformer2DModel" in card
    local = tmp_path / "local"
    SavedTokens.of(attached, base_model=str(tmp_path)).save_pretrained(local)
    assert "base_model:" not in (local / "README.md").read_text()  # the hub takes ids alone


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
