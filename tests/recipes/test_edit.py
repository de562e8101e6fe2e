"""Images changed to new captions: img2img, inversion, and what the detector says of the result."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from PIL import Image
from pipelines_tiny import speaking_pipeline

import edit
from agsm_loss.integrations.tokens.attach import make_soft_tokens
from agsm_loss.integrations.tokens.pipelines import Sampling, load_soft_tokens, set_sampling
from agsm_loss.integrations.tokens.saved import SavedTokens
from lab.world.edits import (
    KINDS,
    Edit,
    changes_of,
    edit_summary,
    edit_table,
    edits_of,
    judge_edit,
    world_edits,
)
from lab.world.geneval_folder import pixels
from lab.world.render import render
from lab.world.scene import Group, Spec, Thing
from model.editing import (
    Changes,
    change,
    encode,
    image_to_image,
    img2img,
    inversion,
    read_changes,
    there_and_back,
)
from model.pipeline import TextToImage
from model.sampling import sample

SAMPLED = {"num_inference_steps": 4, "guidance_scale": 2.0}
FEW = {**SAMPLED, "num_inference_steps": 2}


def loaded(folder):
    """With weights large enough that its prediction depends on the image and the caption."""
    model = TextToImage.load(str(folder), torch.float32)
    for parameter in model.denoiser.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)
    return model


def asked(number=2):
    return changes_of(world_edits(number, seed=0)[:number])


def tokens_of(model, seed=3):
    tokens = make_soft_tokens(model.denoiser)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return tokens


def test_at_strength_one_a_flow_ignores_the_image(flow_base):
    model, changes = loaded(flow_base), asked()
    pipe, seeds = image_to_image(model), [(0, 0), (0, 1)]
    plain = sample(model.pipe, changes.prompts, seeds=seeds, arguments=model.arguments, **SAMPLED)
    whole = img2img(
        model, pipe, changes.images, changes.prompts, strength=1, seeds=seeds, **SAMPLED
    )
    assert np.array_equal(whole, plain)
    half = img2img(
        model, pipe, changes.images, changes.prompts, strength=0.5, seeds=seeds, **SAMPLED
    )
    assert not np.array_equal(half, plain)


def test_strength_is_the_share_of_steps_and_less_of_it_keeps_more(any_base):
    model, changes = loaded(any_base), asked()
    pipe, calls = image_to_image(model), []
    model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    distances = []
    for strength in (0.25, 0.5, 1.0):
        calls.clear()
        out = change(model, pipe, changes, strength=strength, seed=0, **SAMPLED)
        assert len(calls) == 4 * strength
        distances.append(np.abs(out.astype(float) - changes.images).mean())
    assert distances == sorted(distances)


def test_noise_is_the_images_own_in_any_batch(any_base):
    model, changes = loaded(any_base), asked(3)
    pipe = image_to_image(model)
    one, all_ = (
        change(model, pipe, changes, strength=0.5, seed=0, batch_size=size, **SAMPLED)
        for size in (1, 3)
    )
    assert np.abs(one.astype(int) - all_).max() <= 1


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchLCMScheduler(),
        DDIMScheduler(),
        DDIMScheduler(thresholding=True),
        DDIMScheduler(prediction_type="sample"),
        EulerAncestralDiscreteScheduler(),
        DDIMScheduler(set_alpha_to_one=False, timestep_spacing="leading", steps_offset=1),
    ],
)
def test_the_way_back_has_the_noise_levels_of_the_way_there(scheduler):
    there, back = there_and_back(scheduler)
    more = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
    x_0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def gone(way, x, predict):
        way.set_timesteps(10, **more)
        for time in way.timesteps:
            x = way.step(predict(x, time), time, x).prev_sample
        return x

    there.set_timesteps(10, **more)
    back.set_timesteps(10, **more)
    assert torch.allclose(there.timesteps.flip(0).float(), back.timesteps.float())

    def of_time(x, time):  # what does not depend on x is inverted exactly
        return torch.cos(time / 300) * torch.ones_like(x)

    noise = gone(there, x_0, of_time)
    assert (noise - x_0).abs().max() > 0.1
    assert torch.allclose(gone(back, noise, of_time), x_0, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler with other noise levels"),
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr.*Take --method img2"),
        (DDIMScheduler(trained_betas=[0.1, 0.5, 1.0]), "trained_betas that end in 1. Take --met"),
    ],
)
def test_what_cannot_be_inverted_is_refused(scheduler, told):
    with pytest.raises(ValueError, match=told):
        there_and_back(scheduler)


def test_the_cosine_schedule_keeps_enough_of_the_image():
    there, _ = there_and_back(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    assert 0 < there.alphas_cumprod[-1] < 1e-8


@pytest.mark.parametrize("name", ["flow_clean", "epsilon_clean"])
def test_inversion_and_the_same_caption_give_the_image_back(name, recipes):
    folder = str(recipes / "lab" / "models" / name)
    model = TextToImage.load(folder, torch.float32)
    changes = asked(1)
    scheduler = model.pipe.scheduler
    own = Changes(changes.images, changes.captions, changes.captions)
    errors = []
    for steps in (2, 8):
        out = change(
            model, model.pipe, own, strength=None, seed=0,
            num_inference_steps=steps, guidance_scale=1.0,
        )  # fmt: skip
        errors.append(np.abs(out.astype(float) - changes.images).mean())
    assert errors[1] < 2 and errors[1] < errors[0]
    assert model.pipe.scheduler is scheduler
    other, again = (
        inversion(
            model, changes.images, changes.captions, prompts,
            num_inference_steps=2, guidance_scale=4.0,
        )
        for prompts in (changes.prompts, changes.captions)
    )  # fmt: skip
    assert not np.array_equal(other, again)


def spoken(name, folder, side=8):
    model = TextToImage.load(str(speaking_pipeline(name, folder)), torch.float32)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    return model, Changes(images, ["a red circle"] * 2, ["two red circles", "a blue cat"])


@pytest.fixture(scope="module", params=["unet", "unet_sdxl", "sd3", "flux", "qwen"])
def speaking(request, tmp_path_factory):
    return spoken(request.param, tmp_path_factory.mktemp(request.param))


def test_sana_edits_by_inversion_alone(tmp_path):
    model, changes = spoken("sana", tmp_path, side=32)
    with pytest.raises(ValueError, match=r"no img2img pipeline for a SanaPipeline. Take --method"):
        image_to_image(model)
    given = {"num_inference_steps": 8, "guidance_scale": 1.0}
    other, again = (
        inversion(model, changes.images, changes.captions, prompts, **given)
        for prompts in (changes.prompts, changes.captions)
    )
    wanted = model.decode_latents(encode(model, changes.images)).clamp(-1, 1) / 2 + 0.5
    wanted = wanted.permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(again - wanted).mean() < 4
    assert not np.array_equal(other, again)


def test_both_ways_have_the_shift_of_sanas_solver():
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    for one in there_and_back(solver):
        one.set_timesteps(4)
        assert one.config.shift == 3.0
        assert one.sigmas.max() == 1 and one.sigmas.sort().values[2] > 0.5  # unshifted: 0.33


def test_every_pipeline_edits_and_tokens_change_the_result(speaking):
    model, changes = speaking
    pipe = image_to_image(model)
    # Into the pipeline that runs, and for img2img also into the one that it was made of.
    for runs, strength, loads in ((pipe, 1, (pipe, model.pipe)), (model.pipe, None, (model.pipe,))):

        def out(runs=runs, strength=strength):
            return change(model, runs, changes, strength=strength, seed=0, **FEW)

        bare, found = out(), []
        assert bare.shape == (2, 8, 8, 3)
        for one in loads:
            attached = load_soft_tokens(one, tokens_of(model))
            found.append(out())
            attached.detach()
        assert np.array_equal(found[0], found[-1])
        assert not np.array_equal(found[0], bare)
        assert np.array_equal(out(), bare)


def test_branches_are_asked_of_the_pipeline_that_runs(speaking):
    model, changes = speaking
    pipe = image_to_image(model)
    if not hasattr(type(pipe), "do_classifier_free_guidance"):  # Flux, Qwen-Image
        with pytest.raises(ValueError, match=r"Use Sampling\.BOTH"):
            load_soft_tokens(pipe, tokens_of(model), Sampling.CONDITIONAL_ONLY)
        return

    def out():
        return change(model, pipe, changes, strength=1, seed=0, **FEW)

    attached = load_soft_tokens(pipe, tokens_of(model), Sampling.CONDITIONAL_ONLY)
    right = out()
    attached.detach()
    attached = load_soft_tokens(model.pipe, tokens_of(model), Sampling.BOTH)
    both = out()
    set_sampling(pipe, attached, Sampling.CONDITIONAL_ONLY)
    assert np.array_equal(out(), right)
    assert not np.array_equal(both, right)
    attached.detach()


def scene(*things):
    return tuple(Thing(*thing) for thing in things)


TWO = Edit(
    Spec("counting", (Group("circle", 2, "red"),)),
    scene(("circle", "red", 1, 1), ("circle", "red", 9, 9)),
    Spec("counting", (Group("circle", 3, "red"),)),
)
FEWER = Edit(TWO.source, TWO.scene, Spec("counting", (Group("circle", 1, "red"),)))
RECOLOUR = Edit(
    Spec("color_attr", (Group("circle", 1, "red"), Group("square", 1, "blue"))),
    scene(("circle", "red", 1, 1), ("square", "blue", 9, 9)),
    Spec("color_attr", (Group("circle", 1, "green"), Group("square", 1, "blue"))),
)


@pytest.mark.parametrize(
    ("asked_for", "drawn", "changed", "kept"),
    [
        (TWO, TWO.scene, False, True),  # nothing was done
        (TWO, (*TWO.scene, Thing("circle", "red", 17, 17)), True, True),
        (TWO, (*TWO.scene, Thing("square", "red", 17, 17)), False, True),  # another one came
        (TWO, scene(*((("circle", "red", 1 + 8 * i, 17)) for i in range(3))), True, False),
        (TWO, scene(("circle", "red", 1, 1), ("circle", "red", 17, 1)), False, False),
        (TWO, scene(("circle", "red", 3, 2), ("circle", "red", 9, 9)), False, True),  # 2 pixels off
        (TWO, scene(("circle", "red", 4, 1), ("circle", "red", 12, 9)), False, False),  # 3 pixels
        (FEWER, TWO.scene[1:], True, True),
        (FEWER, TWO.scene[:1], True, True),
        (FEWER, scene(("circle", "red", 17, 17)), True, False),
        (FEWER, (), False, False),
        (RECOLOUR, RECOLOUR.scene, False, True),
        (RECOLOUR, (Thing("circle", "green", 1, 1), RECOLOUR.scene[1]), True, True),
        (RECOLOUR, (Thing("circle", "yellow", 1, 1), RECOLOUR.scene[1]), False, True),
        (RECOLOUR, (Thing("circle", "green", 17, 1), RECOLOUR.scene[1]), True, False),  # moved
        (RECOLOUR, (Thing("triangle", "green", 1, 1), RECOLOUR.scene[1]), False, False),
        (RECOLOUR, scene(("circle", "green", 1, 1), ("square", "red", 9, 9)), False, False),
    ],
)
def test_changed_and_kept(asked_for, drawn, changed, kept):
    verdict = judge_edit(asked_for, render(tuple(drawn)))
    assert (verdict.changed, verdict.kept) == (changed, kept)
    assert verdict.correct == (changed and kept)
    told = verdict.reason or ""
    assert ("changed" in told, "kept" in told) == (not changed, not kept)


def test_pixel_error_leaves_out_what_was_to_change():
    right = [
        (TWO, (*TWO.scene, Thing("circle", "red", 17, 17))),
        (FEWER, TWO.scene[1:]),
        (RECOLOUR, (Thing("circle", "green", 1, 1), RECOLOUR.scene[1])),
    ]
    for asked_for, drawn in right:
        assert judge_edit(asked_for, render(drawn)).error == 0
        dirty = np.clip(render(drawn).astype(int) + 8, 0, 255).astype(np.uint8)
        assert 4 < judge_edit(asked_for, dirty).error < 8  # full channels cannot rise
    gone = judge_edit(RECOLOUR, render(RECOLOUR.scene[:1]))
    assert gone.error == pytest.approx(np.sqrt(36 * (2 * 128**2 + 127**2) / 3 / (24**2 - 36)))


def test_the_worlds_edits_are_one_count_or_one_colour_and_known_prompts():
    edits = world_edits(30, seed=1)
    assert [one.kind for one in edits] == 30 * ["count"] + 30 * ["colour"]
    assert edits == world_edits(30, seed=1) != world_edits(30, seed=2)
    assert {one.source.tag for one in edits[:30]} == {"single_object", "counting", "colors"}
    assert {one.source.tag for one in edits[30:]} >= {"colors", "position", "color_attr"}
    for one in edits:
        assert judge_edit(one, one.image).reason == "not changed"
    pair = Spec("two_object", (Group("circle"), Group("square")))
    assert edits_of(pair, "count") == []  # "two circles and a square" is no prompt of the world
    with pytest.raises(ValueError, match="kind"):
        edits_of(pair, "size")


def test_the_table_has_shares_with_intervals():
    right = (Thing("circle", "green", 1, 1), RECOLOUR.scene[1])
    verdicts = [judge_edit(RECOLOUR, render(one)) for one in (right, RECOLOUR.scene)]
    summary = edit_summary(verdicts)
    told = summary["colour"]
    assert (told["n"], told["changed"], told["kept"], told["both"]) == (2, 0.5, 1, 0.5)
    assert told["changed_low"] < 0.1 and told["changed_high"] > 0.9
    last = edit_table({"base": summary}).splitlines()[-1]
    assert last.startswith("| base | colour | 2 | 0.50 [0.09, 0.91] | 1.00 [")


def test_the_command_on_the_world(flow_base, tmp_path):
    model = TextToImage.load(str(flow_base), torch.float32)
    attached = load_soft_tokens(model.pipe, tokens_of(model))
    SavedTokens.of(attached).save_pretrained(tmp_path / "tokens")
    edit.main(["--model", str(flow_base), "--tokens", str(tmp_path / "tokens"),
               "--num_images", "2", "--num_inference_steps", "2", "--strength", "0.5,1",
               "--output_dir", str(tmp_path / "a")])  # fmt: skip
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    names = ["strength 0.5", "strength 1"]
    names += [f"{name}, with tokens" for name in names]
    assert list(scores) == names and set(scores[names[0]]) == set(KINDS)
    for name in names:
        folder = tmp_path / "a" / name.replace(",", "").replace(" ", "_")
        assert len(list(folder.glob("*/samples/0000.png"))) == 4
        assert "include" in json.loads((folder / "00000" / "metadata.jsonl").read_text())
    assert pixels(tmp_path / "a" / "sheet.png").shape[1] == 5 * 152
    with pytest.raises(ValueError, match="not empty"):
        edit.main(["--model", str(flow_base), "--output_dir", str(tmp_path / "a")])


def table(tmp_path, ending, **changed):
    Image.fromarray(TWO.image).resize((48, 30)).save(tmp_path / "a.png")
    row = {"image": str(tmp_path / "a.png"), "caption": "a circle", "new_caption": "two circles"}
    row |= changed
    file = tmp_path / f"edits.{ending}"
    line = json.dumps(row) if ending == "jsonl" else ",".join(row) + "\n" + ",".join(row.values())
    file.write_text(line + "\n")
    return file


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_the_command_on_a_table(epsilon_base, tmp_path, ending):
    model = TextToImage.load(str(epsilon_base), torch.float32)
    model.add_lora(2)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_lora(tmp_path / "lora")
    edit.main(["--model", str(epsilon_base), "--data", str(table(tmp_path, ending)),
               "--lora", str(tmp_path / "lora"),
               "--method", "inversion", "--num_inference_steps", "2",
               "--output_dir", str(tmp_path / "out")])  # fmt: skip
    made = [tmp_path / "out" / f"inversion{extra}" / "00000" for extra in ("", "_with_lora")]
    assert json.loads((made[0] / "metadata.jsonl").read_text()) == {"prompt": "two circles"}
    bare, changed = (pixels(folder / "samples" / "0000.png") for folder in made)
    assert bare.shape == (24, 24, 3) and not np.array_equal(bare, changed)
    assert pixels(tmp_path / "out" / "sheet.png").shape[1] == 3 * 152
    assert not (tmp_path / "out" / "scores.json").exists()


def test_bad_tables(tmp_path):
    with pytest.raises(ValueError, match="row 0 cannot be read"):
        read_changes(str(table(tmp_path, "jsonl", image="nowhere.png")), size=24, number=1)
    with pytest.raises(ValueError, match=r"row 0 cannot be read: expected a text"):
        read_changes(str(table(tmp_path, "jsonl", new_caption="")), size=24, number=1)
    (tmp_path / "b.jsonl").write_text('{"image": "a.png", "caption": "a circle"}\n')
    with pytest.raises(ValueError, match=r"columns .*new_caption.* got 1 rows"):
        read_changes(str(tmp_path / "b.jsonl"), size=24, number=1)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--strength", "0.5,1.5"], "strength: expected shares"),
        (["--strength", "much"], "strength: expected shares"),
        (["--method", "inversion", "--strength", "0.5"], "strength: it is img2img's"),
        (["--data", "edits.jsonl"], "model: expected a pipeline"),
    ],
)
def test_bad_options_are_one_line(flags, told, capsys):
    with pytest.raises(SystemExit):
        edit.main(flags)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_strength_without_a_step_and_half_precision_without_latents(epsilon_base):
    model, changes = loaded(epsilon_base), asked()
    pipe = image_to_image(model)
    with pytest.raises(ValueError, match="at least one of 4 steps"):
        change(model, pipe, changes, strength=0.1, seed=0, **SAMPLED)
    assert encode(model, changes.images).shape == (2, 3, 24, 24)
    model.denoiser.to(torch.bfloat16)
    with pytest.raises(ValueError, match="no latents of 3 channels"):
        change(model, pipe, changes, strength=0.5, seed=0, **SAMPLED)
