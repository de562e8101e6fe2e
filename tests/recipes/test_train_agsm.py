"""The soft-token recipe: objectives, resume, other data, two processes, what it refuses."""

import inspect
import json

import compiled_recipe
import fresh
import pytest
import torch
import two_processes
from ranks import run_ranks
from recipe_runs import log
from safetensors.torch import load_file

import train_agsm
from lab.world.export import captioned

FEW = ["--max_train_steps", "4", "--train_batch_size", "4", "--logging_steps", "1",
       "--validation_steps", "9", "--validation_per_category", "1",
       "--validation_inference_steps", "1", "--checkpointing_steps", "2",
       "--num_tokens", "2"]  # fmt: skip


def train(model, folder, *flags):
    train_agsm.main(["--model", str(model), "--output_dir", str(folder), *FEW, *flags])
    return load_file(folder / "tokens" / "model.safetensors")


@pytest.mark.parametrize(("competitors", "captions"), [("empty", 2), ("empty,hard:1", 3)])
def test_the_empty_caption_competes_too(flow_base, tmp_path, competitors, captions):
    train(flow_base, tmp_path, "--candidates", competitors, "--max_train_steps", "1")
    (line,) = log(tmp_path)
    assert line["agsm/chance_weight"] == pytest.approx(1 / captions)


def test_a_killed_run_resumes_to_the_same_tokens(any_base, tmp_path, monkeypatch):
    flags = ["--temperature", "entropy:0.7", "--candidates", "in_batch:1,hard:2",
             "--gradient_accumulation_steps", "2"]  # fmt: skip
    whole = train(any_base, tmp_path / "whole", *flags)
    prepare, calls = train_agsm.prepare, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 7:  # in the fourth step
            raise KeyboardInterrupt
        return prepare(*args)

    monkeypatch.setattr(train_agsm, "prepare", killed)
    with pytest.raises(KeyboardInterrupt):
        train(any_base, tmp_path / "cut", *flags)
    monkeypatch.setattr(train_agsm, "prepare", prepare)
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        train(any_base, tmp_path / "cut", *flags)
    resumed = train(any_base, tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run(flow_base, tmp_path):
    """Passes of several sizes, with and without gradient; the LoRA's wrapper breaks the graph.

    In a fresh process, because executed shape annotations cannot be traced.
    """
    few = "--rank", "2", "--max_train_steps", "2", "--validation_inference_steps", "1"
    train(flow_base, tmp_path / "plain", *few)
    flags = ["--model", str(flow_base), "--output_dir", str(tmp_path / "compiled"), *FEW, *few]
    fresh.run(compiled_recipe.main, [*flags, "--compile"])
    plain, compiled = ([line["loss"] for line in log(tmp_path / one) if "loss" in line]
                       for one in ("plain", "compiled"))  # fmt: skip
    assert len(plain) == 2
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--objective", "softrepa", "--banks", "shared"],
        ["--objective", "denoising", "--banks", "positive_only"],
        ["--banks", "shared", "--candidates", "hard:3"],
        ["--neg_scale", "0", "--banks", "positive_only", "--num_layers", "1"],
        ["--chunk_size", "3", "--gradient_checkpointing", "--timestep_density", "logit_normal"],
    ],
    ids=" ".join,
)
def test_every_objective_moves_the_tokens_and_never_the_backbone(flow_base, tmp_path, flags):
    before = train(flow_base, tmp_path / "still", *flags, "--learning_rate", "1e-30")
    after = train(flow_base, tmp_path / "run", *flags)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert set(moved) == {name for name in before if name != "frozen"}
    last = log(tmp_path / "run")[-1]
    assert 0 <= last["scores"]["overall"] <= 1
    assert ("agsm/win_rate" in last) == ("denoising" not in flags)
    assert list((tmp_path / "run" / "sheets").glob("*.png"))


def test_a_chunked_run_is_the_whole_run(flow_base, tmp_path):
    whole = train(flow_base, tmp_path / "whole")
    chunked = train(flow_base, tmp_path / "chunked", "--chunk_size", "3")
    for name in whole:
        torch.testing.assert_close(whole[name], chunked[name], atol=1e-4, rtol=1e-3)


def test_tokens_load_into_the_pipeline_and_say_where_they_come_from(any_base, tmp_path):
    from agsm_loss.integrations.tokens.pipelines import load_soft_tokens
    from agsm_loss.integrations.tokens.saved import SavedTokens
    from model.pipeline import TextToImage

    train(any_base, tmp_path)
    saved = SavedTokens.from_pretrained(tmp_path / "tokens")
    assert saved.base_model == str(any_base)
    assert saved.training["num_tokens"] == 2
    model = TextToImage.load(str(any_base), torch.float32)
    attached = load_soft_tokens(model.pipe, tmp_path / "tokens")
    assert model.pipe("two red circles", num_inference_steps=1).images[0].size == (24, 24)
    attached.detach()


def test_a_lora_is_trained_beside_the_tokens_and_loads_again(any_base, tmp_path):
    from model.pipeline import TextToImage

    flags = ["--rank", "2", "--learning_rate", "0.05"]
    whole = train(any_base, tmp_path / "run", *flags)
    lora = load_file(next((tmp_path / "run" / "lora").glob("*.safetensors")))
    assert any(bool(value.any()) for name, value in lora.items() if "lora_B" in name)  # 0 at first
    for steps in ("2", "4"):
        more = ["--resume_from_checkpoint", "latest", "--max_train_steps", steps]
        train(any_base, tmp_path / "again", *flags, *more)
    again = load_file(next((tmp_path / "again" / "lora").glob("*.safetensors")))
    assert lora.keys() == again.keys()
    resumed = load_file(tmp_path / "again" / "tokens" / "model.safetensors")
    assert all(torch.equal(lora[name], again[name]) for name in lora)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def drawn(lora):
        model = TextToImage.load(str(any_base), torch.float32)
        model.load_extras(str(tmp_path / "run" / "tokens"), lora)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 2, "output_type": "pt", "generator": generator}
        return model.pipe("two red circles", **arguments).images

    assert not torch.equal(drawn(""), drawn(str(tmp_path / "run" / "lora")))


def test_any_table_of_images_and_captions_will_do(flow_base, tmp_path):
    captioned(8, seed=0).to_parquet(tmp_path / "w.parquet")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two red circles\na square\n")
    flags = ["--data", str(tmp_path / "w.parquet"), "--candidates", "hard:3"]
    flags += ["--validation_prompts", str(prompts)]
    train(flow_base, tmp_path / "run", *flags)
    train(flow_base, tmp_path / "run", *flags, "--resume_from_checkpoint", "latest")
    assert log(tmp_path / "run")[-1]["scores"] == {}
    assert (tmp_path / "run" / "sheets" / "000004.png").exists()


def test_what_makes_no_sense_is_refused(flow_base, tmp_path):
    with pytest.raises(ValueError, match="SoftREPA has one bank"):
        train(flow_base, tmp_path / "a", "--objective", "softrepa")
    from model.pipeline import TextToImage

    with pytest.raises(TypeError, match="StableDiffusion3Pipeline"):
        TextToImage(object())


@pytest.mark.parametrize(
    ("flags", "form", "passes", "trained"),
    [
        ([], "gamma+ 1, gamma- 0.1 against in_batch:3; teacher: its EMA (0.9)", 32, 16),
        (["--rank", "2"], "guidance scale 3 against empty; teacher: itself", 8, 4),
        (
            ["--full", "--neg_scale", "0.5", "--candidates", "in_batch:3"],
            "gamma+ 1, gamma- 0.5 against in_batch:3; teacher: its EMA (0.9)", 32, 16,
        ),
    ],
)  # fmt: skip
def test_what_was_derived_is_printed(flow_base, tmp_path, capsys, flags, form, passes, trained):
    train(flow_base, tmp_path, "--max_train_steps", "1", *flags)
    title, *summary, step, validating, scores, saved, then = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in summary)
    assert title == "AGSM" and list(told) == [
        "model", "device", "trains", "AGSM", "validation", "data", "steps", "output"]  # fmt: skip
    assert told["AGSM"] == form and told["output"] == str(tmp_path)
    assert told["steps"] == "1 to 1, in batches of 4" and told["validation"].startswith("6 prompts")
    assert told["validation"].endswith("CFG 1" if "scale 3" in form else "CFG 3")
    # Of 4 images: their captions, and those that compete, by the teacher and by the student.
    assert step.startswith(f"A step: {passes} forward passes of one image, {trained} of them")
    assert validating.startswith("Validating: ") and scores.startswith("step 1: overall ")
    assert saved.startswith(f"Saved {tmp_path / 'tokens'}")
    assert then.startswith("Next: python recipes/generate.py --model")
    stored = json.loads((tmp_path / "options.json").read_text())
    assert form.startswith("guidance") or f"gamma- {stored['neg_scale']:g} " in form


@pytest.mark.parametrize("flags", [["--rank", "2"], ["--full"]])
def test_the_negatives_train_the_tokens_alone(flow_base, tmp_path, flags):
    def trained(name, *more):
        published = "--pos_scale", "1", "--candidates", "in_batch:3", "--learning_rate", "1e-3"
        few = "--max_train_steps", "1", *flags, *published, *more
        made = train(flow_base, tmp_path / name, *few)
        folder = tmp_path / name / ("lora" if "--rank" in flags else "pipeline/transformer")
        return made["tokens"], load_file(next(folder.glob("*.safetensors")))

    # One step from the same start: the shared weights' gradient is the positive term's (but for
    # the clipping of the whole, to which Adam is all but blind).
    (tokens, none), (others, some) = trained("none"), trained("some", "--neg_scale", "1")
    torch.testing.assert_close(some, none, rtol=0, atol=2e-5)
    assert (tokens - others).abs().max() > 1e-4


@pytest.mark.slow
def test_two_processes_train_the_same_tokens_on_other_batches(flow_base, tmp_path):
    flags = ["--model", str(flow_base), "--output_dir", str(tmp_path / "two"), *FEW]
    run_ranks(two_processes.recipe, 2, "train_agsm", flags)
    two = load_file(tmp_path / "two" / "tokens" / "model.safetensors")
    alone = train(flow_base, tmp_path / "alone")
    assert all(bool(torch.isfinite(value).all()) for value in two.values())
    assert not torch.equal(two["tokens"], alone["tokens"])
    first, single = log(tmp_path / "two")[0], log(tmp_path / "alone")[0]
    for name in ("loss", "grad_norm"):  # both ranks'
        assert first[name] != pytest.approx(single[name], rel=1e-4)
    states = tmp_path / "two" / "checkpoints" / "checkpoint_4"
    assert {f.name for f in states.glob("random_states*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }


def test_logit_normal_timesteps_are_for_flows(flow_base, tmp_path):
    from model.pipeline import TextToImage

    model = TextToImage.load(str(flow_base), torch.float32)
    generator = torch.Generator().manual_seed(0)
    drawn = model.timesteps(4000, "logit_normal", generator)
    even = model.timesteps(4000, "uniform", generator)
    assert 0 <= drawn.min() and drawn.max() <= 1000
    assert drawn.std() < even.std() - 50
    from diffusers import DDIMScheduler

    model.pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="flow matching"):
        model.timesteps(4, "logit_normal", generator)
    whole = model.timesteps(4, "uniform", generator)
    assert torch.equal(whole, whole.round())


def test_prompts_are_encoded_once_and_the_cache_is_bounded(flow_base, monkeypatch):
    from model.pipeline import TextToImage

    model = TextToImage.load(str(flow_base), torch.float32)
    kept = model.encode_prompts(["a square"])
    one = sum(value.nbytes for value in kept.values())
    model = TextToImage(model.pipe, cached_bytes=2 * one)
    asked = []
    encode = model.pipe.encode_prompt

    def counted(prompt, prompt_2, prompt_3, device, **settings):  # the names that a pipeline has
        asked.append(prompt)
        return encode(prompt, prompt_2, prompt_3, device, **settings)

    counted.__signature__ = inspect.signature(encode)
    monkeypatch.setattr(model.pipe, "encode_prompt", counted)
    several, one_more = ["two red circles", *["a square"] * 7], ["a circle"] * 8
    first = model.encode_prompts(["two red circles", "a square", "two red circles"])
    assert asked == [several]  # eight a pass, whatever is asked
    assert torch.equal(first["prompt_embeds"][0], first["prompt_embeds"][2])
    model.encode_prompts(["a circle"])  # puts out the one that was asked longest ago
    model.encode_prompts(["two red circles"])
    assert asked[1:] == [one_more]
    model.encode_prompts(["a square"])
    assert asked[2:] == [["a square"] * 8]


def test_training_keeps_to_its_share_of_the_schedule(flow_base):
    from diffusers import DDIMScheduler

    from model.pipeline import TextToImage

    generator = torch.Generator().manual_seed(0)
    model = TextToImage.load(str(flow_base), torch.float32)
    for density in ("uniform", "logit_normal"):
        drawn = model.timesteps(4000, density, generator, 0.7)
        assert 700 <= drawn.min() < 710 and 990 < drawn.max() <= 1000
    for low in (-0.1, 1.0):
        with pytest.raises(ValueError, match="timestep_low: expected"):
            model.timesteps(4, "uniform", generator, low)
    model.pipe.scheduler = DDIMScheduler()
    drawn = model.timesteps(4000, "uniform", generator, 0.7)
    assert set(drawn.tolist()) == set(range(700, 1000))
    assert model.timesteps(3, "uniform", generator, 0.9999).tolist() == [999] * 3
