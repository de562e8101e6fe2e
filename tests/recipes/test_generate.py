"""Prompts to images in GenEval's layout, and images to scores."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import score_images
import train_dpo
import train_nft
from data.prompts import read_prompts
from lab.world.geneval_folder import pixels, read_results
from lab.world.prompts import rows
from lab.world.render import render
from lab.world.score import Verdict
from lab.world.summary import summarize_with_intervals, wilson
from model.pipeline import TextToImage
from model.sampling import default_guidance_scale, sample

DEEP = pytest.param("[" * 200000, id="deep")


def files(folder):
    found = sorted(folder.glob("*/samples/*.png"))
    return {str(f.relative_to(folder)): pixels(f) for f in found}


def run(model, folder, *flags):
    generate.main(["--model", str(model), "--output_dir", str(folder), "--prompts",
                   "world:validation:1", "--num_inference_steps", "2",
                   "--num_images_per_prompt", "2", *flags])  # fmt: skip
    return files(folder)


def test_the_layout_is_genevals_and_a_second_call_goes_on(flow_base, tmp_path):
    whole = run(flow_base, tmp_path / "a")
    assert set(whole) == {f"{i:05d}/samples/{k:04d}.png" for i in range(6) for k in range(2)}
    for i, row in enumerate(rows("validation", 1)):
        assert json.loads((tmp_path / "a" / f"{i:05d}" / "metadata.jsonl").read_text()) == row
    assert not np.array_equal(whole["00000/samples/0000.png"], whole["00000/samples/0001.png"])

    lost = tmp_path / "a" / "00003" / "samples" / "0001.png"
    kept = tmp_path / "a" / "00001" / "samples" / "0000.png"
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    again = run(flow_base, tmp_path / "a", "--batch_size", "5")
    assert kept.stat().st_mtime_ns == stamp
    for name in whole:  # the same noise in any batch
        assert np.abs(whole[name].astype(int) - again[name]).max() <= 1
    with pytest.raises(ValueError, match="guidance_scale"):
        run(flow_base, tmp_path / "a", "--guidance_scale", "7")


def test_a_sheet_shows_the_tokens_beside_the_model_without_them(flow_base, tmp_path, capsys):
    from agsm_loss.integrations.denoisers import TokenDenoiser

    denoiser = TokenDenoiser(TextToImage.load(str(flow_base), torch.float32).denoiser, num_tokens=2)
    torch.nn.init.normal_(denoiser.tokens.tokens, std=3.0)
    denoiser.save_pretrained(tmp_path / "tokens")
    tokens = ["--tokens", str(tmp_path / "tokens")]
    plain = run(flow_base, tmp_path / "plain", "--sheet")
    first = run(flow_base, tmp_path / "a", *tokens)
    assert not (tmp_path / "a" / "sheet.png").exists()
    again = run(flow_base, tmp_path / "a", *tokens, "--sheet")  # the images are there already
    assert all(np.array_equal(first[name], again[name]) for name in first)

    def shown(folder, column, row, columns):
        page = pixels(folder / "sheet.png")
        top = page.shape[0] - (-(-6 * columns // 4)) * (144 + 52)
        y, x = row * (144 + 52) + 2 + top, column * (144 + 8) + 4
        return page[y : y + 144 : 6, x : x + 144 : 6]

    name = "00000/samples/0000.png"
    assert not np.array_equal(first[name], plain[name])
    assert np.array_equal(shown(tmp_path / "a", 0, 0, 2), plain[name])  # the same noise
    assert np.array_equal(shown(tmp_path / "a", 1, 0, 2), first[name])
    assert np.array_equal(shown(tmp_path / "plain", 1, 1, 1), plain["00005/samples/0000.png"])
    assert "12 images in" in capsys.readouterr().out


def lora(base, folder, seed=0):
    """A LoRA with weights that change the model."""
    model = TextToImage.load(str(base), torch.float32)
    model.add_lora(2)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=generator)
    model.save_lora(folder)
    return ["--lora", str(folder)]


def test_several_strengths_of_a_lora_are_columns_and_folders(flow_base, tmp_path, capsys):
    flags = lora(flow_base, tmp_path / "lora")
    told = ["--lora_scale", "0", "0.5", "1"]
    run(flow_base, tmp_path / "a", *flags, *told, "--num_images_per_prompt", "1")
    assert pixels(tmp_path / "a" / "sheet.png").shape[1] == 3 * (144 + 8)  # a prompt a line
    found = {scale: files(tmp_path / "a" / f"lora_scale_{scale}") for scale in ("0", "0.5", "1")}
    bare = run(flow_base, tmp_path / "bare", "--num_images_per_prompt", "1")
    whole = run(flow_base, tmp_path / "whole", *flags, "--num_images_per_prompt", "1")
    name = "00000/samples/0000.png"
    assert len(bare) == 6 and all(np.array_equal(found["0"][one], bare[one]) for one in bare)
    assert all(np.array_equal(found["1"][one], whole[one]) for one in bare)
    assert not np.array_equal(found["0.5"][name], bare[name])
    assert not np.array_equal(found["0.5"][name], whole[name])
    assert f"--images {tmp_path}/a/lora_scale_0 {tmp_path}/a/l" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(flow_base, tmp_path / "b", "--lora_scale", "0.5")
    assert "lora_scale: expected strengths of a LoRA" in capsys.readouterr().err


def test_what_is_kept_is_kept_by_content(flow_base, tmp_path, capsys):
    """Prompts, LoRA and model are what they were, or there is an error; their names are free."""
    prompts, out = tmp_path / "p.txt", tmp_path / "a"
    flags = lora(flow_base, tmp_path / "lora")
    model = shutil.copytree(flow_base, tmp_path / "model")

    def again(*more, prompts=prompts, model=model):
        given = {"model": model, "prompts": prompts, "output_dir": out, "num_inference_steps": 1}
        generate.main([*(f"--{name}={value}" for name, value in given.items()), *flags, *more])
        return files(out)

    prompts.write_text("two red circles\none blue square\n")
    first = again()
    prompts.write_text("two red circles\none blue square\na green cross\n")
    more = again("--sheet")  # more prompts at the end, and a sheet of all
    assert len(more) == 3 and all(np.array_equal(first[name], more[name]) for name in first)
    (moved := tmp_path / "q.txt").write_text(prompts.read_text())
    again(prompts=moved, model=shutil.copytree(model, tmp_path / "same"))
    assert "All 3 images are in" in capsys.readouterr().out

    prompts.write_text("one green triangle\ntwo red circles\none blue square\n")
    with pytest.raises(ValueError, match=r"00000 holds images of 'two red circles', which is not"):
        again()
    prompts.write_text("two red circles\n")  # the others' would be scored with it
    with pytest.raises(ValueError, match=r"00001 holds images of 'one blue square'"):
        again()
    shutil.copytree(tmp_path / "lora", tmp_path / "as it was")
    lora(flow_base, tmp_path / "lora", seed=1)
    with pytest.raises(ValueError, match=r"made with other \['lora'\]; choose another"):
        again(prompts=moved)
    shutil.copytree(tmp_path / "as it was", tmp_path / "lora", dirs_exist_ok=True)
    again(prompts=moved)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 5.0}))
    with pytest.raises(ValueError, match=r"made with other \['model'\]; choose another"):
        again(prompts=moved)
    assert len(files(out)) == 3


def test_the_guidance_scale_is_what_was_trained_for(tmp_path):
    assert default_guidance_scale(["", "owner/name", str(tmp_path)]) == 3.0
    (tmp_path / "lora").mkdir()
    for scale, wanted in ((1.0, 1.0), (4.5, 4.5), (None, 3.0)):
        (tmp_path / "options.json").write_text(json.dumps({"validation_guidance_scale": scale}))
        for folder in (tmp_path, tmp_path / "lora"):
            assert default_guidance_scale(["", str(folder)]) == wanted


def test_guidance_in_one_of_the_parts_is_found(tmp_path, monkeypatch):
    for name, scale in (("start/pipeline", 3.0), ("tokens/tokens", 2.0), ("agsm/lora", 1.0)):
        (tmp_path / name).mkdir(parents=True)
        told = json.dumps({"validation_guidance_scale": scale})
        (tmp_path / name).with_name("options.json").write_text(told)
    start, tokens, lora = (
        str(tmp_path / one) for one in ("start/pipeline", "tokens/tokens", "agsm/lora")
    )
    (file := tmp_path / "agsm/lora/pytorch_lora_weights.safetensors").touch()
    assert default_guidance_scale([start, tokens, ""]) == 2.0
    for given in ([start, "", lora], [lora, "", start], [str(file)]):
        assert default_guidance_scale(given) == 1.0
    for recipe, flags in ((train_nft, ["--reward", "redness"]), (train_dpo, [])):
        assert (
            recipe.OPTIONS.parse("", ["--merge_lora", lora, *flags]).validation_guidance_scale
            == 1.0
        )
    monkeypatch.chdir(lora)
    assert default_guidance_scale(["."]) == 1.0


@pytest.mark.parametrize(
    "content",
    [
        '{"validation_guidance_scale": 1',
        "text",
        DEEP,
        *(json.dumps({"validation_guidance_scale": one}) for one in ([1.0], "1", -1, math.nan)),
    ],
)
def test_a_scale_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "options.json").write_text(content)
    (tmp_path / "lora").mkdir()
    with pytest.raises(ValueError, match=r"options\.json.*: expected .*or give --guidance_scale"):
        default_guidance_scale([str(tmp_path / "lora")])


@pytest.mark.parametrize("scales", [["nan"], ["inf"], ["0", "inf"], ["1", "1"], ["1", "1.0000001"]])
def test_strengths_are_finite_and_have_a_folder_each(scales, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("model", tmp_path, "--lora", "lora", "--lora_scale", *scales)
    assert "lora_scale: expected finite strengths that differ" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [None, "[]", '{"seed": 0', '{"contents": null}', DEEP])
def test_images_of_which_nothing_is_known_are_not_kept(kept, tmp_path, flow_base):
    drawn(tmp_path)
    if kept is not None:
        (tmp_path / "generate.json").write_text(kept)
    with pytest.raises(ValueError, match=r"(?i)generate\.json.* choose another --output_dir, or d"):
        run(flow_base, tmp_path)


def test_images_whose_prompt_is_not_known_are_not_kept(flow_base, tmp_path):
    run(flow_base, tmp_path)
    file = tmp_path / "00002" / "metadata.jsonl"
    for row in ("null", '{"tag": "x"}', '{"prompt": "a', "", None):
        file.unlink() if row is None else file.write_text(row)
        with pytest.raises(ValueError, match=r"00002.*(?i:choose another --output_dir)"):
            run(flow_base, tmp_path)


@pytest.mark.parametrize("name", ["a", "a/00003", "a/00003/samples"])
def test_a_file_in_the_place_of_a_folder_is_found_at_once(name, flow_base, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"output_dir: expected a folder .*{name} is a file\."):
        run(flow_base, tmp_path / "a")


@pytest.mark.parametrize("name", ["00001/samples/0001.png", "sheet.png", "00002/metadata.jsonl"])
def test_a_full_disk_names_the_file(name, flow_base, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.with_suffix(".part") if "samples" in name else file).symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{name}: could not be written: No space .* Make room"):
        run(flow_base, tmp_path, "--sheet")


def test_infinite_numbers_are_no_picture(flow_base):
    """Pipelines would make them white or black."""
    pipe = TextToImage.load(str(flow_base), torch.float32).pipe
    [*_, last] = (one for one in pipe.vae.decoder.modules() if isinstance(one, torch.nn.Conv2d))
    last.bias = torch.nn.Parameter(torch.full((3,), torch.inf))
    with pytest.raises(FloatingPointError, match="infinite ones in a batch of 1, first prompt 'a'"):
        sample(pipe, ["a"], seeds=[0], num_inference_steps=1, guidance_scale=1.0)


def test_prompts_are_lines_or_rows(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    assert read_prompts(str(tmp_path / "p.txt")) == [
        {"prompt": "a cat"},
        {"prompt": "a dog"},
    ]
    (tmp_path / "p.jsonl").write_text('{"tag": "x", "prompt": "a cat"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl")) == [{"tag": "x", "prompt": "a cat"}]
    (tmp_path / "q.jsonl").write_text('{"tag": "x"}\n')
    with pytest.raises(ValueError, match="prompt"):
        read_prompts(str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match="PER_CATEGORY"):
        read_prompts("world:heldout")
    with pytest.raises(FileNotFoundError):
        read_prompts("nowhere.txt")


def drawn(folder):
    """Right pictures for half of the rows and empty ones for the others."""
    from lab.world.prompts import TAGS, specs
    from lab.world.scene import place

    wanted = rows("validation", 4)
    every = {json.dumps(_row(s)): s for tag in TAGS for s in specs(tag, "validation")}
    for i, row in enumerate(wanted):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row))
        scene = place(every[json.dumps(row)], np.random.default_rng(i)) if i % 2 else ()
        Image.fromarray(render(scene)).save(folder / f"{i:05d}" / "samples" / "0000.png")
    return wanted


def _row(spec):
    from lab.world.captions import metadata

    return metadata(spec)


def test_scores_of_a_folder(tmp_path, capsys):
    drawn(tmp_path)
    score_images.main(["--images", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["overall"] == 0.5 and scores["n"] == 24
    assert scores["metrics"]["palette_error"] == {"score": 0.0, "low": 0.0, "high": 0.0}
    for category in scores["categories"].values():
        assert category["score"] == 0.5 and category["under"] == 0.5
        assert category["low"] < 0.5 < category["high"]
    assert scores["low"] > category["low"]  # six categories together are surer than one
    assert (
        "0.500 [" in (tmp_path / "scores.md").read_text() and "0.500 [" in capsys.readouterr().out
    )
    with Image.open(tmp_path / "scores.png") as sheet:
        assert sheet.size[0] > 100


def test_genevals_own_results_make_the_same_table(tmp_path):
    wanted = drawn(tmp_path)
    lines = [
        {
            "filename": f"/elsewhere/{tmp_path.name}/{i:05d}/samples/0000.png",
            "tag": row["tag"],
            "correct": i % 2 == 1,
            "reason": "" if i % 2 else "expected a thing>=1, found 0",
            "metadata": json.dumps(row) if i else row,  # a text, as its evaluator writes it
        }
        for i, row in enumerate(wanted)
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(line) for line in lines))
    score_images.main(["--images", str(tmp_path), "--results", str(results)])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["overall"] == 0.5 and scores["metrics"] == {}
    assert "over" not in scores["categories"]["counting"]  # its evaluator doesn't say
    results.write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match="no result for 00001"):
        score_images.main(["--images", str(tmp_path), "--results", str(results)])


def results_of(folder, lines, name="results.jsonl"):
    """The verdicts that a file of these lines gives of a folder's images."""
    file = folder / name
    whole = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(one + "\n" for one in whole))
    return read_results(file, sorted(folder.glob("*/samples/*.png")), folder)


def result_of(i, folder="", **changes):
    name = f"{folder}/" if folder else ""
    return {"filename": f"{name}{i:05d}/samples/0000.png", "tag": "x", "correct": i % 2 == 1,
            **changes}  # fmt: skip


@pytest.mark.parametrize("right", [True, "True", "true", 1, "1"])
@pytest.mark.parametrize("wrong", [False, "False", "FALSE", 0, "0"])
def test_only_what_is_true_is_right(right, wrong, tmp_path):
    drawn(tmp_path)
    judged = [(right if i % 2 else wrong) for i in range(24)]
    lines = [result_of(i, correct=one) for i, one in enumerate(judged)]
    assert [one.correct for one in results_of(tmp_path, lines)] == [False, True] * 12
    cells = [f"{i:05d}/samples/0000.png,x,{one}" for i, one in enumerate(judged)]
    found = results_of(tmp_path, ["filename,tag,correct", *cells], "results.csv")
    assert [one.correct for one in found] == [False, True] * 12


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({"correct": one}, "correct as true or false") for one in (math.nan, None, 2, "no", "")),
        ({"tag": None}, "a tag, and correct"),
        ({"filename": 7}, "and reason, as GenEval"),
        *(({"metadata": one}, "metadata as GenEval's") for one in (None, "", "{", "[" * 200000)),
        ({"metadata": {"include": [{"class": "dog"}]}}, "a class and a count"),
        *(({"details": one}, "details as a list of boxes") for one in ("{", None, {"dog": 7})),
    ],
)
def test_a_result_that_cannot_be_read_is_named(changes, told, tmp_path):
    drawn(tmp_path)
    lines = [result_of(i) for i in range(24)]
    with pytest.raises(ValueError, match=rf"results\.jsonl, line 3: expected .*{told}"):
        results_of(tmp_path, [*lines[:2], result_of(2, **changes), *lines[3:]])


def test_results_are_this_folders(tmp_path):
    (here := tmp_path / "a").mkdir()
    for folder in (here, tmp_path / "b", tmp_path / "other" / "a"):
        drawn(folder)
    for named in (here, "/moved/a", "a", ""):  # an evaluator may have seen it elsewhere
        assert len(results_of(here, [result_of(i, named) for i in range(24)])) == 24
    for named in (tmp_path / "b", "/moved/b", tmp_path / "other" / "a"):
        with pytest.raises(ValueError, match=rf"line 1: expected results of .* one of {named}\."):
            results_of(here, [result_of(i, named) for i in range(24)])
    with pytest.raises(ValueError, match="line 2: expected results of"):
        results_of(here, [result_of(i, f"/{'xy'[i % 2]}/a") for i in range(24)])
    every = [result_of(i) for i in range(24)]
    assert len(results_of(here, [*every, every[3]])) == 24
    with pytest.raises(ValueError, match="line 25: expected one result for 00003/samples/"):
        results_of(here, [*every, result_of(3, correct=False)])


@pytest.mark.parametrize(
    ("gone", "more", "told"),
    [
        (["00004/samples/0000.png", "00007/samples"], "", r"expected 1 .* 2 of 24 .* first 00004"),
        ([], "00003/samples/0001.png", r"expected 2 images .* 23 of 24 prompts, first 00000"),
        (["00005/metadata.jsonl"], "", r"none in 1 folders, first 00005"),
        ([], "00002/metadata.jsonl", r"00002/metadata\.jsonl: expected one row, .*got 2\."),
    ],
)
def test_a_folder_that_is_not_whole_is_not_scored(gone, more, told, tmp_path):
    drawn(tmp_path)
    for name in gone:
        one = tmp_path / name
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    if more.endswith(".png"):
        shutil.copy(tmp_path / "00003" / "samples" / "0000.png", tmp_path / more)
    elif more:
        row = (tmp_path / more).read_text()
        (tmp_path / more).write_text(f"{row}\n{row}\n")
    with pytest.raises(ValueError, match=told):
        score_images.main(["--images", str(tmp_path)])
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({"include": one} for one in (["cat"], [{}], 7, None, [], [{"class": "circle"}])),
        {"include": [{"class": "circle", "count": "two"}]},
        {"include": [{"class": "circle", "count": 1, "position": ["above", 0]}]},
        {"exclude": None},
        {"tag": None},
    ],
)
def test_a_row_that_is_not_genevals_is_named(change, tmp_path):
    row = drawn(tmp_path)[1] | change
    (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"00001/metadata\.jsonl: expected include, a class and"):
        score_images.main(["--images", str(tmp_path)])


@pytest.mark.parametrize("name", ["scores.json", "scores.md", "scores.png"])
def test_scores_that_cannot_be_written_are_named(name, tmp_path):
    drawn(tmp_path)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{name}: could not be written: No space .* Make room"):
        score_images.main(["--images", str(tmp_path)])


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images"):
        score_images.main(["--images", str(tmp_path)])


def test_hidden_files_and_a_bom_are_no_obstacle(tmp_path):
    drawn(tmp_path)
    (tmp_path / "00000" / "samples" / "._0000.png").write_bytes(b"mac")
    metadata = tmp_path / "00001" / "metadata.jsonl"
    metadata.write_bytes(b"\xef\xbb\xbf" + metadata.read_bytes())
    score_images.main(["--images", str(tmp_path)])
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 24


def test_bad_files_are_named_before_anything_is_scored(tmp_path):
    rows = drawn(tmp_path)
    image, metadata = (tmp_path / "00023" / name for name in ("samples/0000.png", "metadata.jsonl"))

    def fails(told):
        with pytest.raises(ValueError, match=told):
            score_images.main(["--images", str(tmp_path)])
        assert not (tmp_path / "scores.json").exists()

    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    fails(r"00023/samples/0000\.png")
    Image.new("RGB", (32, 24)).save(image)
    fails(r"0000\.png: expected 24 pixels a side.* got 32 x 24")
    image.write_bytes(whole)
    metadata.write_text(json.dumps(rows[23] | {"prompt": None}))
    fails(r"00023/metadata\.jsonl, line 1: expected a prompt")
    metadata.write_text(json.dumps(rows[23]))
    (tmp_path / "results.jsonl").write_text('{"filename": "a.png"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: expected filename, tag"):
        score_images.main(["--images", str(tmp_path), "--results", f"{tmp_path}/results.jsonl"])


def test_intervals_cover_what_they_should():
    low, high = wilson(10, 20)
    assert low == pytest.approx(0.2993, abs=1e-4) and high == pytest.approx(0.7007, abs=1e-4)
    sure = [Verdict("counting", True, None, 1, 1)] * 50
    summary = summarize_with_intervals(sure)
    assert summary["high"] == 1.0 and 0.9 < summary["low"] < 1.0


@pytest.mark.parametrize(("size", "scale", "number"), [(24, 1, 64), (64, 8, 4), ([64, 96], 8, 4)])
def test_large_pictures_are_sampled_few_a_call(size, scale, number):
    """64 of the world's size; of Stable Diffusion's a call's activations would fill a GPU."""
    asked = []

    class Pipe:
        unet, vae_scale_factor = torch.nn.Identity(), scale

        def __call__(self, prompt, **settings):
            asked.append(len(prompt))
            return SimpleNamespace(images=np.zeros((len(prompt), 2, 2, 3)))

    Pipe.unet.config = {"sample_size": size}
    images = sample(Pipe(), ["a"] * 70, seeds=range(70), num_inference_steps=1, guidance_scale=1.0)
    assert max(asked) == number and len(images) == sum(asked) == 70
