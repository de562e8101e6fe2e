"""train_dpo.py and train_inpo.py: resume, the host alone, LoRA, full fine-tuning, tables."""

import pytest
import torch
from recipe_runs import log
from safetensors.torch import load_file

import train_agsm
import train_dpo
import train_inpo
from lab.world.export import preferences
from model.trained import TrainedModel

FEW = ["--max_train_steps", "4", "--train_batch_size", "3", "--logging_steps", "1",
       "--validation_steps", "9", "--beta", "50", "--validation_per_category", "1",
       "--validation_inference_steps", "1", "--checkpointing_steps", "2", "--num_tokens", "2",
       "--candidates", "in_batch:2"]  # fmt: skip
RECIPES = {"dpo": train_dpo, "inpo": train_inpo}


def train(recipe, model, folder, *flags):
    own = {"dpo": [], "inpo": ["--inversion_steps", "3"]}[recipe]
    flags = ["--model", str(model), "--output_dir", str(folder), *FEW, *own, *flags]
    RECIPES[recipe].main(flags)
    found = {}
    for file in sorted(folder.glob("*/*.safetensors")) + sorted(
        folder.glob("pipeline/transformer/*.safetensors")
    ):
        found |= {f"{file.parent.name}/{name}": value for name, value in load_file(file).items()}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "inpo"])
def test_a_killed_run_resumes_to_the_same_weights(recipe, epsilon_base, tmp_path, monkeypatch):
    flags = ["--rank", "2", "--agsm_weight", "0.5", "--candidates", "empty,in_batch:1,hard:1",
             "--temperature", "entropy:0.7", "--ema_decay", "0.9"]  # fmt: skip
    whole = train(recipe, epsilon_base, tmp_path / "whole", *flags)
    assert {name.split("/")[0] for name in whole} == {"tokens", "lora"}
    last = log(tmp_path / "whole")[-1]
    assert {"dpo/accuracy", "dpo/margin", "agsm/loss", "agsm/win_rate"} <= last.keys()
    build, calls = TrainedModel.agsm, []

    def killing(self, *args):
        regularizer = build(self, *args)
        update = regularizer.update_ema

        def after():
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            update()

        regularizer.update_ema = after
        return regularizer

    monkeypatch.setattr(TrainedModel, "agsm", killing)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, epsilon_base, tmp_path / "cut", *flags)
    monkeypatch.setattr(TrainedModel, "agsm", build)
    assert same(
        whole,
        train(recipe, epsilon_base, tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest"),
    )
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.slow
def test_inpo_gives_agsm_noise_of_its_own(epsilon_base, tmp_path):
    flags = ["--rank", "2", "--agsm_weight", "0.5", "--max_train_steps", "1"]
    train("inpo", epsilon_base, tmp_path / "inverted", *flags, "--agsm_noise", "inverted")
    train("inpo", epsilon_base, tmp_path / "gaussian", *flags)
    one, other = (log(tmp_path / name)[0] for name in ("inverted", "gaussian"))
    for key in ("dpo/loss", "dpo/margin", "dpo/error"):  # the host draws what it drew
        assert one[key] == pytest.approx(other[key], rel=1e-6)
    assert one["agsm/loss"] != pytest.approx(other["agsm/loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "inpo"])
def test_the_host_alone_draws_what_it_draws_beside_agsm(recipe, epsilon_base, tmp_path):
    flags = ["--rank", "2", "--max_train_steps", "2"]
    host = train(recipe, epsilon_base, tmp_path / "host", *flags)
    tiny = train(recipe, epsilon_base, tmp_path / "tiny", *flags, "--agsm_weight", "1e-12")
    much = train(recipe, epsilon_base, tmp_path / "much", *flags, "--agsm_weight", "5")
    hosts, others = log(tmp_path / "host"), log(tmp_path / "tiny")
    assert hosts[0]["dpo/loss"] == others[0]["dpo/loss"] != log(tmp_path / "much")[-1]["dpo/loss"]
    lora = [name for name in host if name.startswith("lora/")]
    for name in lora:
        torch.testing.assert_close(host[name], tiny[name], atol=1e-5, rtol=1e-3)
    assert any(not torch.allclose(host[name], much[name], atol=1e-5) for name in lora)
    assert "agsm/loss" not in hosts[-1]


def test_dpo_on_a_flow_and_all_of_the_denoiser(flow_base, tmp_path):
    trained = train(
        "dpo",
        flow_base,
        tmp_path / "full",
        "--full",
        "--num_tokens",
        "0",
        "--learning_rate",
        "1e-3",
    )
    assert trained and all(name.startswith("transformer/") for name in trained)
    before = load_file(flow_base / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = [k for k in before if not torch.equal(before[k], trained[f"transformer/{k}"])]
    assert moved
    # The reference is the model as it was, so the first step stands at log 2.
    first, last = log(tmp_path / "full")[0], log(tmp_path / "full")[-1]
    assert first["dpo/loss"] == pytest.approx(0.6931, abs=1e-3) and first["dpo/margin"] == 0
    assert last["dpo/margin"] != 0
    # The sequential way: what was tuned is a model like any other.
    train_agsm.main(
        ["--model", str(tmp_path / "full" / "pipeline"), "--output_dir", str(tmp_path / "next"),
         *[one for one in FEW if one not in ("--beta", "50")]]
    )  # fmt: skip
    assert (tmp_path / "next" / "tokens").exists()


def test_a_tuned_lora_is_merged_before_the_next_method(flow_base, tmp_path):
    train("dpo", flow_base, tmp_path / "dpo", "--rank", "2", "--learning_rate", "0.05")
    from model.pipeline import TextToImage

    plain = TextToImage.load(str(flow_base), torch.float32)
    merged = TextToImage.load(str(flow_base), torch.float32)
    merged.merge_lora(str(tmp_path / "dpo" / "lora"))
    kept = TextToImage.load(str(flow_base), torch.float32)
    kept.load_extras("", str(tmp_path / "dpo" / "lora"))
    assert not any("lora" in name for name, _ in merged.denoiser.named_parameters())
    assert not any(p.requires_grad for p in merged.denoiser.parameters())
    text = plain.encode_prompts(["two red circles"])
    noisy = torch.randn(1, *_shape(plain), generator=torch.Generator().manual_seed(0))

    def run(model):
        with torch.no_grad():
            return model.denoiser(
                hidden_states=noisy,
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=text["prompt_embeds"],
                pooled_projections=text["pooled_prompt_embeds"],
            ).sample

    assert torch.allclose(run(merged), run(kept), atol=1e-5)
    assert not torch.allclose(run(merged), run(plain), atol=1e-4)


def _shape(model):
    config = model.denoiser.config
    return config.in_channels, config.sample_size, config.sample_size


def test_pairs_of_a_table_train_too(flow_base, tmp_path):
    preferences(6, seed=1).to_parquet(str(tmp_path / "pairs.parquet"))
    flags = ["--data", str(tmp_path / "pairs.parquet"), "--rank", "2", "--agsm_weight", "1"]
    train("dpo", flow_base, tmp_path / "run", *flags, "--candidates", "in_batch:1,hard:1")
    assert log(tmp_path / "run")[-1]["agsm/loss"] > 0


def test_what_cannot_be_trained_is_refused(flow_base, tmp_path):
    flags = ["--rank", "2", "--agsm_weight", "1", "--train_batch_size", "1"]
    with pytest.raises(ValueError, match=r"expected 2 at least.*--candidates empty"):
        train("dpo", flow_base, tmp_path / "x", *flags)
    with pytest.raises(ValueError, match="Use DiffusionDPO"):
        train("inpo", flow_base, tmp_path / "y", "--rank", "2")
