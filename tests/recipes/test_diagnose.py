"""diagnose.py: the numbers against NumPy, every case of the verdict, the config that it writes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import diagnose
import train_agsm
from diagnosis import measure as measuring
from diagnosis.levels import Levels, Numbers, Suspect, against, summarize
from diagnosis.measure import COLUMNS, EDITS, KINDS, Measured, measure
from diagnosis.report import conclude
from diagnosis.verdict import columns_of, competitors, options_of, verdict
from lab.world.data import WorldBatches
from lab.world.export import captioned
from model.pipeline import TextToImage

EDITED, IN_BATCH, EMPTY = (list(KINDS[name]) for name in ("edited", "in_batch", "empty"))


def predictions(images=40, levels=3, elements=12, seed=0):
    """(pred (I, L, K, D), target (I, L, D)), at every level a little further from the truth."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((images, levels, elements))
    away = (
        np.array([0.5, 0.8, 0.9, 1.0, 1.1, 0.7])[:, None] * (1 + np.arange(levels))[:, None, None]
    )
    return target[:, :, None] + away * rng.standard_normal((images, levels, 6, elements)), target


def measured_of(pred, target, mask=None):
    rest = torch.from_numpy(pred - target[:, :, None])
    gram = torch.einsum("ilkd,ilmd->ilkm", rest, rest) / rest.shape[-1]
    own = torch.from_numpy(pred[:, :, 0]).square().mean(-1)
    mask = torch.ones(len(pred), COLUMNS, dtype=torch.bool) if mask is None else mask
    texts = [[f"{i}/{k}" for k in range(COLUMNS)] for i in range(len(pred))]
    return Measured(gram, own, mask, texts, list(range(len(pred))), 0.5, 16, 2**20)


def softmax(errors, temperature):
    share = np.exp(-(errors - errors.min(-1, keepdims=True)) / temperature)
    return share / share.sum(-1, keepdims=True)


@pytest.mark.parametrize("columns", [EDITED, IN_BATCH, EMPTY, [1, *EMPTY]])
def test_the_numbers_are_those_of_plain_loops(columns):
    pred, target = predictions()
    got = against(measured_of(pred, target), columns, entropy=0.8)
    errors = ((pred - target[:, :, None]) ** 2).mean(-1)[:, :, [0, *columns]]
    share = softmax(errors, got.one_temperature)
    entropy = -(share * np.log(share)).sum(-1).mean() / np.log(errors.shape[-1])
    assert entropy == pytest.approx(0.8, abs=0.01)
    for level in range(3):
        here = errors[:, level]
        alone = softmax(here, got.temperature[level])
        assert -(alone * np.log(alone)).sum(-1).mean() / np.log(here.shape[-1]) == pytest.approx(
            0.8, abs=0.01
        )
        wins = [row[0] < other for row in here for other in row[1:]]
        assert got.win_rate[level] == pytest.approx(np.mean(wins))
        assert got.excess[level] == pytest.approx((here[:, 1:] - here[:, :1]).mean())
        assert got.spread[level] == pytest.approx(here.std(-1).mean())
        assert got.weight[level] == pytest.approx(share[:, level, 0].mean())
        assert got.default_weight[level] == pytest.approx(softmax(here, 0.1)[:, 0].mean())
        delta, cfg, to_target, away = [], [], [], []
        for i in range(len(pred)):
            p, w = pred[i, level], share[i, level]
            delta.append(p[0] - sum(w[n] * p[k] for n, k in enumerate([0, *columns])))
            cfg.append(p[0] - p[5])
            away.append(p[0] - p[list(columns)].mean(0))
            to_target.append(target[i, level] - p[0])
        delta, cfg, to_target, away = map(np.ravel, (delta, cfg, to_target, away))

        def cosine(a, b):
            return a @ b / np.sqrt((a @ a) * (b @ b))

        power = (pred[:, level, 0] ** 2).mean()
        assert got.size[level] == pytest.approx(np.sqrt((delta**2).mean() / power))
        assert got.strength[level] == pytest.approx(np.linalg.lstsq(away[:, None], delta)[0][0])
        assert got.toward_cfg[level] == pytest.approx(cosine(delta, cfg))
        assert got.toward_target[level] == pytest.approx(cosine(delta, to_target))
    assert got.chance == pytest.approx(1 / errors.shape[-1])


def test_captions_that_an_image_does_not_have_are_not_read():
    pred, target = predictions()
    mask = torch.ones(40, COLUMNS, dtype=torch.bool)
    mask[20:, 2] = mask[30:, 1] = False
    broken = pred.copy()
    broken[20:, :, 2] = 1e3
    few = against(measured_of(broken, target, mask), EDITED, entropy=0.8)
    again = against(measured_of(pred, target, mask), EDITED, entropy=0.8)
    for name, value in vars(again).items():
        np.testing.assert_allclose(getattr(few, name), value, err_msg=name)
    errors = ((pred - target[:, :, None]) ** 2).mean(-1)
    wins = (errors[:30, 0, 1] > errors[:30, 0, 0]).sum() + (
        errors[:20, 0, 2] > errors[:20, 0, 0]
    ).sum()
    assert few.win_rate[0] == pytest.approx(wins / 50)
    assert few.chance == pytest.approx((20 / 3 + 10 / 2) / 30)
    assert summarize(measured_of(pred, target, mask), entropy=0.8).with_edits == 0.75
    none = against(measured_of(pred, target, mask & ~mask), EDITED, entropy=0.8)
    assert np.isnan(none.win_rate).all() and np.isnan(none.one_temperature)
    with pytest.raises(ValueError, match="--batch_size"):
        summarize(measured_of(pred, target, mask & ~mask), entropy=0.8)


def test_the_mean_direction_does_not_count_what_averages_out():
    """Captions of the batch are the empty one and noise of their own: CFG's, on average."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal((2000, 1, 20))
    pred = np.repeat(target[:, :, None], COLUMNS, axis=2)
    pred[:, :, 1:] += rng.standard_normal((2000, 1, 1, 20))
    pred[:, :, 3:5] += 2 * rng.standard_normal((2000, 1, 2, 20))
    pred[:, :, 1:3] = target[:, :, None] + rng.standard_normal((2000, 1, 1, 20))
    measured = measured_of(pred, target)
    in_batch, edited = (against(measured, one, entropy=0.9) for one in (IN_BATCH, EDITED))
    assert in_batch.mean_toward_cfg == pytest.approx(1, abs=0.05)
    assert in_batch.toward_cfg < 0.7
    assert edited.mean_toward_cfg == pytest.approx(0, abs=0.05)


def test_ties_are_half_a_win():
    pred, target = predictions()
    pred[:] = pred[:, :, :1]
    got = against(measured_of(pred, target), IN_BATCH, entropy=0.8)
    assert got.win_rate == pytest.approx(0.5)


def test_equal_weights_leave_all_the_guidance_and_the_rest_goes_by_how_captions_differ():
    """Where a caption changes the prediction much, the weights take its guidance away first."""
    pred, target = predictions(images=400, levels=1)
    pred[:, :, 0] = target
    pred[:200, :, 5], pred[200:, :, 5] = target[:200] + 0.1, target[200:] + 1.0
    got = against(measured_of(pred, target), EMPTY, entropy=0.7)
    equal = against(measured_of(pred, target), EMPTY, entropy=0.9999)
    assert equal.strength == pytest.approx(0.5, abs=0.01)
    small, large = (1 / (1 + np.exp(gap / got.one_temperature)) for gap in (0.01, 1.0))
    assert got.strength == pytest.approx((0.01 * small + 1.0 * large) / 1.01)
    assert got.strength < 1 - got.weight - 0.1


# The verdict.


def levels(win=0.8, *, number=10, **changes):
    """Levels with the same numbers everywhere, but for those that are given by level."""
    usual = {
        "win_rate": win, "excess": 0.1, "spread": 0.1, "temperature": 0.1, "weight": 0.6,
        "default_weight": 0.6, "size": 0.1, "toward_cfg": 0.5, "toward_target": 0.0,
        "mean_toward_cfg": 0.5, "strength": 0.4, "default_strength": 0.4,
    } | changes  # fmt: skip
    single = {name: usual.pop(name, 0.5) for name in ("one_temperature", "chance")}
    arrays = {name: np.broadcast_to(np.asarray(v, float), number) for name, v in usual.items()}
    return Levels(**arrays, **single)


def numbers(edited=None, in_batch=None, empty=None, suspects=(), images=256, with_edits=1.0):
    kinds = {
        "edited": edited or levels(0.7),
        "in_batch": in_batch or levels(0.8),
        "empty": empty or levels(0.8, excess=0.05),
    }
    return Numbers(images, with_edits, kinds, list(suspects), 100)


def told(given, chosen=None):
    """Name -> finding."""
    choice = competitors(given)
    rest = verdict(given, choice, chosen or levels(), 0.7)
    return {one.name: one for one in [*choice, *rest]}


IN_PART = np.repeat([0.5, 0.7], [6, 4])
EASY = levels(0.99)
PAIRS = [Suspect(7, 7, "a cat", "an animal", 0.2)] * 5
HARD = {"candidates": "hard", "num_negatives": 1, "null_caption": True}


@pytest.mark.parametrize(("given", "chosen", "name", "says", "options"), [
    (numbers(levels(0.5, size=0.002), levels(0.52, size=0.001), levels(0.5)), None, "ignores_text",
     "ignores its text: another caption changes at most", {"objective": "denoising"}),
    (numbers(levels(0.5), levels(0.52), levels(0.3)), None, "captions_do_not_fit",
     "(win rate 0.52 at most)", {"objective": "denoising"}),
    (numbers(images=16, in_batch=levels(0.7)), None, "captions_do_not_fit", "by chance", {}),
    (numbers(), None, "decides", "at all noise levels", {}),
    (numbers(levels(0.5), levels(IN_PART)), None, "decides_in_part",
     "above 60% of the noise schedule: use --timestep_low 0.6", {"timestep_low": 0.6}),
    (numbers(levels(0.5), levels(IN_PART[::-1])), None, "decides_in_part", "below 40%", {}),
    (numbers(levels(0.5), levels(np.roll(IN_PART, -2))), None, "decides_in_part",
     "between 40% and 80%", {"timestep_low": 0.4}),
    (numbers(in_batch=EASY), None, "easy", "too easy (win rate 0.99): use edited ones", HARD),
    (numbers(levels(np.nan), EASY), None, "easy", "teach little",
     {"num_negatives": 0, "null_caption": True}),
    (numbers(levels(0.52)), None, "edits_at_chance", "apart (win rate 0.52",
     {"candidates": "in_batch", "num_negatives": 2, "null_caption": True}),
    (numbers(levels(0.5), levels(mean_toward_cfg=0.95)), None, "same_direction",
     "(cosine 0.95)", {"num_negatives": 0, "null_caption": True}),
    (numbers(empty=levels(0.9, excess=0.2)), None, "empty_unknown", "do not use --null_caption",
     {"null_caption": False}),
    (numbers(empty=levels(0.4, excess=-0.1)), None, "empty_unknown", "do not use --null_caption",
     {"null_caption": False}),
    (numbers(), None, "competitors", "an edit of the image's own, the empty caption", HARD),
    (numbers(with_edits=0.2), None, "competitors", "(20% of the images have one)",
     {"candidates": "mixed", "num_negatives": 2, "null_caption": True}),
    (numbers(), levels(default_weight=0.52, one_temperature=0.002), "at_chance",
     "(w+ is 0.52, chance 0.50): use --target_entropy 0.7 (T = 0.002", {"target_entropy": 0.7}),
    (numbers(), levels(default_weight=0.99), "saturated", "(w+ is 0.99, chance 0.50)",
     {"target_entropy": 0.7}),
    (numbers(), levels(default_weight=0.52, weight=np.arange(10) / 10, strength=0.1), "weights",
     "0.00 to 0.90 by level, and the weights leave 20% of the guidance", {}),
    (numbers(), levels(default_weight=0.52, strength=0.1), "equal_weights",
     "the empty caption alone",
     {"target_entropy": 0.0, "temperature": 0.1, "num_negatives": 0, "null_caption": True,
      "validation_guidance_scale": 1.0}),
    (numbers(), levels(default_weight=0.7), "temperature", "T = 0.1 ranks", {"temperature": 0.1}),
    (numbers(suspects=PAIRS), None, "false_negatives", "5 of 100", {}),
    (numbers(), levels(default_weight=0.52, strength=0.5), "sample_without", "of scale 2.0",
     {"validation_guidance_scale": 1.0}),
    (numbers(), levels(default_strength=0.1), "sample_with", "of scale 1.1", {}),
    (numbers(empty=levels(0.9, excess=0.2)), None, "sample_as_before", "sample as before", {}),
])  # fmt: skip
def test_the_cases_of_the_verdict(given, chosen, name, says, options):
    found = told(given, chosen)
    assert says in found[name].text
    every = options_of(list(found.values()))
    assert {key: every[key] for key in options} == options
    assert ("timestep_low" in every) == ("timestep_low" in options)
    assert ("validation_guidance_scale" in every) == ("sample_without" in found)


@pytest.mark.parametrize(("candidates", "number", "null", "columns"), [
    ("in_batch", 2, False, [3, 4]), ("hard", 1, True, [1, 5]), ("mixed", 2, True, [1, 3, 5]),
    ("in_batch", 0, True, [5]),
])  # fmt: skip
def test_the_columns_of_the_options(candidates, number, null, columns):
    options = {"candidates": candidates, "num_negatives": number, "null_caption": null}
    assert columns_of(options) == columns


@pytest.mark.parametrize(("given", "absent"), [
    (numbers(), {"easy", "edits_at_chance", "same_direction", "empty_unknown", "false_negatives"}),
    (numbers(levels(0.5), levels(0.5)), {"competitors", "temperature", "sample_without"}),
    (numbers(empty=levels(0.9, excess=0.2)), {"equal_weights"}),
])  # fmt: skip
def test_what_the_verdict_does_not_say(given, absent):
    assert not absent & set(told(given))


def test_suspected_false_negatives_are_named():
    pred, target = predictions(levels=5)
    pred[:, :, 3:5] += 1.0  # the own caption wins clearly, but on four images
    pred[:4, :3, 3] = target[:4, :3] + 0.01  # and there at most of the levels
    pred[4:8, :2, 3] = target[4:8, :2] + 0.01
    found = summarize(measured_of(pred, target), entropy=0.7)
    assert found.pairs == 80 and (found.kinds["in_batch"].win_rate > 0.8).all()
    assert {one.row for one in found.suspects} == {0, 1, 2, 3}
    first = found.suspects[0]
    assert (first.own, first.other) == (f"{first.row}/0", f"{first.row}/3")
    gains = [one.gain for one in found.suspects]
    assert gains == sorted(gains, reverse=True)
    assert "false_negatives" in {one.name for one in conclude(measured_of(pred, target), 0.7)[1]}
    few = measured_of(pred[:, :2], target[:, :2])
    assert summarize(few, entropy=0.7).suspects == []  # at two levels chance would name some


# The command.


def test_the_errors_are_the_models_own(any_base, monkeypatch, tmp_path):
    captioned(6, seed=1).to_parquet(tmp_path / "w.parquet")
    flags = ["--data", str(tmp_path / "w.parquet"), "--resolution", "24", "--model", "org/any"]
    options = diagnose.OPTIONS.parse(None, flags)
    from data.task import open_task

    task = open_task(options, SimpleNamespace(process_index=0, num_processes=1))
    model = TextToImage.load(str(any_base), torch.float32)
    seen, noised = [], measuring.add_noise
    monkeypatch.setattr(measuring, "add_noise", lambda *args: seen.append(args) or noised(*args))
    found = measure(model, task.images(4, EDITS), batches=2, seed=0, levels=2)
    assert found.gram.shape == (8, 2, COLUMNS, COLUMNS) and len(seen) == 4
    assert found.mask[:, 5].all() and {texts[5] for texts in found.captions} == {""}
    assert not found.mask.all() and found.batch_size == 4 and found.pass_seconds > 0
    for place, (scheduler, latents, noise, timesteps) in enumerate(seen):
        batch, level = divmod(place, 2)
        assert ((timesteps >= 500 * level) & (timesteps <= 500 * (level + 1))).all()
        for row in range(4):
            image = 4 * batch + row
            one = [x[row : row + 1] for x in (latents, noise, timesteps)]
            for column in range(COLUMNS):
                if not found.mask[image, column]:
                    continue
                text = model.encode_prompts([found.captions[image][column]])
                noisy = noised(scheduler, *one)
                target = measuring.regression_target(scheduler, *one)
                denoiser = measuring.PlainDenoiser(model.denoiser)
                with torch.no_grad():
                    error = (denoiser(noisy, one[2], text, 0) - target).square().mean()
                got = found.errors[image, level, column]
                assert float(got) == pytest.approx(float(error), rel=1e-4)


class Shuffled(WorldBatches):
    """Every image with the caption of the next one, and that one's edits."""

    def __getitem__(self, index):
        batch = super().__getitem__(index)
        captions, hard = (one[1:] + one[:1] for one in (batch.captions, batch.hard))
        return replace(batch, captions=captions, hard=hard)


@pytest.mark.parametrize("data", [WorldBatches, Shuffled])
def test_captions_of_other_images_are_at_chance(recipes, data):
    path = str(recipes / "lab" / "models" / "epsilon_clean")
    model = TextToImage.load(path, torch.float32)
    measured = measure(model, data(32, EDITS, seed=0), batches=1, seed=0, levels=2)
    found, findings = conclude(measured, 0.7)
    rate = found.kinds["in_batch"].win_rate
    if data is WorldBatches:
        assert rate[1] > 0.8 and options_of(findings)["objective"] == "agsm"
    else:
        assert abs(rate - 0.5).max() < 0.15
        assert [one.name for one in findings] == ["captions_do_not_fit"]


def test_the_config_trains(flow_base, tmp_path, monkeypatch, capsys):
    pred, target = predictions(images=4, levels=10)
    pred[:, :, 1:] += 1.0
    pred[0, :6, 3] = target[0, :6]
    monkeypatch.setattr(measuring, "measure", lambda *args, **settings: measured_of(pred, target))
    data = tmp_path / "w.parquet"
    captioned(8, seed=0).to_parquet(data)
    folder = tmp_path / "out"
    flags = ["--model", str(flow_base), "--data", str(data), "--resolution", "24",
             "--batch_size", "4", "--output_dir", str(folder)]  # fmt: skip
    diagnose.main(flags)
    printed = capsys.readouterr().out
    assert printed == (folder / "verdict.txt").read_text()
    assert f"train_agsm.py --config {folder / 'config.yaml'}" in printed
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml", "verdict.txt", "diagnosis.json", "diagnosis.png", "suspects.png",
    }  # fmt: skip
    table = yaml.safe_load((folder / "config.yaml").read_text())
    train_agsm.main(["--config", str(folder / "config.yaml"), "--full", "--num_tokens", "0",
                     "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    options = yaml.safe_load((tmp_path / "run" / "options.json").read_text())
    assert {name: options[name] for name in table} == table
    assert table["objective"] == "agsm" and columns_of(table)
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_a_whole_run_on_an_untrained_model(flow_base, tmp_path):
    diagnose.main(["--model", str(flow_base), "--num_images", "3", "--batch_size", "2",
                   "--output_dir", str(tmp_path)])  # fmt: skip
    config = train_agsm.OPTIONS.parse(None, ["--config", str(tmp_path / "config.yaml")])
    assert config.model == str(flow_base)
    table = yaml.safe_load((tmp_path / "diagnosis.json").read_text())
    assert table["images"] == 4 and len(table["kinds"]["in_batch"]["win_rate"]) == 10
