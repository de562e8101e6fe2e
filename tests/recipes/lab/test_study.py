"""A study: plans, what a run leaves behind, going on, intervals, the report."""

import html
import json
import re
import time
from itertools import pairwise

import numpy as np
import pytest
import yaml
from PIL import Image

import study
from lab.studies import figures, report, run
from lab.studies.plan import Plan, folder_of, jobs_of, read_plan, recipe_of


def plan_file(folder, model, **changes):
    values = {
        "model": str(model),
        "output_dir": str(folder / "out"),
        "seeds": [0, 1],
        "guidance_scales": [1.0, 2.0],
        "sweep_per_category": 1,
        "per_category": 2,
        "num_inference_steps": 1,
        "common": {"max_train_steps": 2, "train_batch_size": 2, "logging_steps": 1,
                   "validation_steps": 9, "validation_per_category": 1,
                   "validation_inference_steps": 1, "checkpointing_steps": 1, "num_tokens": 1},
        "methods": {"AGSM": {"learning_rate": 0.01}},
        **changes,
    }  # fmt: skip
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_study_from_plan_to_report(flow_base, tmp_path, monkeypatch):
    file = plan_file(tmp_path, flow_base, references={"twin": str(flow_base)})
    plan = read_plan(file)
    # In this process instead of one each: importing torch six times is most of the time.
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: _in_process(command))
    study.main(["--config", str(file), "--jobs", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in results] == jobs_of(plan)
    base, twin, agsm = results[:3]
    assert base["sweep"] == twin["sweep"] and base["correct"] == twin["correct"]
    assert len(agsm["correct"]) == 12 and set(agsm["sweep"]) == {"1.0", "2.0"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| AGSM |" in text and "| twin |" in text
    row = text.split("## By guidance")[1].split("| base | ")[1].split(" |\n")[0]
    swept = [result["sweep"]["2.0"] for result in (base, results[3])]
    counting = [one["categories"]["counting"]["score"] for one in swept]
    overall = np.mean([one["overall"] for one in swept])
    assert row.split(" | ")[1] == f"{overall:.3f}, {np.mean(counting):.3f}"
    gaps = np.subtract(
        *([r["heldout"]["overall"] for r in group] for group in (results[2::3], results[::3]))
    )
    row = text.split("## Against the base")[1].split("| AGSM | ")[1].split(" | ")
    assert row[0].startswith(f"{gaps.mean():+.3f}") and row[1] == f"± {report.spread(gaps)[1]:.3f}"
    cleanness = text.split("## How clean")[1].split("## ")[0]
    assert cleanness.count(" ± ") == 3 and "| AGSM | 0.00" not in cleanness
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<table>" in page and page.count('src="data:image/png;base64,') == 2 == page.count(
        "src="
    )
    for name in ("curves.png", "images.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 300

    def refuse(command, **_):
        raise AssertionError("a run that is done was started again")

    monkeypatch.setattr(run.subprocess, "call", refuse)
    study.main(["--config", str(file), "--jobs", "2"])

    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: 3)
    (folder_of(plan, "AGSM", 1) / "result.json").unlink()
    with pytest.raises(RuntimeError, match="AGSM, seed 1: exit 3"):
        study.main(["--config", str(file), "--jobs", "2"])


def test_models_of_other_entries_sampled_at_other_scales(flow_base, tmp_path, monkeypatch):
    """They are not trained again, wait for what they sample, and say what guidance gains."""
    sampled = {
        "guided": {"of": "base", "guidance_scales": [2.0]},
        "AGSM, guided": {"of": "AGSM", "guidance_scales": [1.0, 3.0]},
    }
    file = plan_file(tmp_path, flow_base, sampled=sampled, seeds=[0], guidance_scales=[1.0])
    plan = read_plan(file)
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: _in_process(command))
    trained = []
    main = recipe_of("", {}).main
    monkeypatch.setattr(recipe_of("", {}), "main", lambda line: trained.append(main(line)))
    study.main(["--config", str(file), "--jobs", "1"])
    assert len(trained) == 1
    results = {r["method"]: r for r in json.loads((tmp_path / "out/results.json").read_text())}
    assert [name for name, _ in jobs_of(plan)] == list(results)
    assert (results["guided"]["cfg"], results["guided"]["sweep"]) == (2.0, {})
    assert list(results["AGSM, guided"]["sweep"]) == ["1.0", "3.0"]

    def images(name):
        return figures.images_of(plan, name, 0)

    assert not np.array_equal(images("base"), images("guided"))
    if results["AGSM, guided"]["cfg"] == 1.0:
        assert np.array_equal(images("AGSM"), images("AGSM, guided"))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## What guidance gains" not in text  # nothing: no picture is right
    heldout = results["guided"]["heldout"]
    every = {tag: one | {"score": 1.0} for tag, one in heldout["categories"].items()}
    right = {"correct": [1] * 12, "heldout": {**heldout, "overall": 1.0, "categories": every}}
    groups = {name: [one] for name, one in results.items()}
    gains = report._recovered(plan, {**groups, "guided": [results["guided"] | right]})
    rows = [line.strip("| ").split(" | ") for line in gains.splitlines() if line.startswith("| ")]
    passes = {row[0]: row[3] for row in rows}
    assert (passes["base"], passes["guided"]) == ("1", "2")
    assert "Right pictures, of the held-out ones: base " in text
    assert "Classifier-free guidance brings the base to " in text and "at twice the cost" in text
    assert "(CFG) 1, but where the column CFG has another: AGSM, guided at the guidance" in text

    swept = text.split("## By guidance scale")[1].split("##")[0]
    assert "| AGSM, guided |" in swept and "| base |" not in swept


@pytest.mark.parametrize(
    "options",
    [{"of": "A"}, {"of": "B", "guidance_scales": [2.0]}, {"of": "A", "guidance_scales": []}, "A"],
)
def test_bad_entries_to_sample_are_refused(tmp_path, options):
    file = plan_file(tmp_path, "m", methods={"A": {}}, sampled={"C": options})
    with pytest.raises(ValueError, match="sampled: C: expected"):
        read_plan(file)


@pytest.mark.slow
def test_a_study_of_guidance_kept(flow_base, tmp_path, monkeypatch):
    learner = {"rank": 1, "num_tokens": 0, "data": "world:corner:4"}
    rivals = {**learner, "recipe": "lab.train_rivals", "objective": "drift"}
    methods = {"a start": {"full": True, "num_tokens": 0}, "drift": {**rivals, "after": "a start"}}
    sampled = {"drift, CFG": {"of": "drift", "guidance_scales": [2.0]}}
    file = plan_file(tmp_path, flow_base, methods=methods, sampled=sampled, scale_images=6,
                     guidance_scales=[1.0], seeds=[0])  # fmt: skip
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: _in_process(command))
    study.main(["--config", str(file), "--jobs", "1"])
    results = {r["method"]: r for r in json.loads((tmp_path / "out/results.json").read_text())}
    assert {*results["base"]} - {*results["drift, CFG"]} == {"held_scale"}
    text = (tmp_path / "out" / "report.md").read_text()
    table = text.split("## The new thing, and guidance")[1].split("## ")[0]
    assert "| drift |" in table and "| drift, CFG |" not in table
    assert (tmp_path / "out" / "kept.png").exists()


@pytest.mark.slow
def test_methods_of_other_recipes_and_after_one_another(flow_base, tmp_path, monkeypatch):
    dpo = {"recipe": "train_dpo", "rank": 1, "num_tokens": 0, "learning_rate": 0.05, "beta": 50.0}
    file = plan_file(
        tmp_path,
        flow_base,
        methods={"DPO": dpo, "then AGSM": {"after": "DPO", "learning_rate": 1e-30}},
        panels={"implicit accuracy": "dpo/accuracy"},
        baselines=["DPO"],
        pairs=5,
        guidance_scales=[2.0],
    )
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: _in_process(command))
    study.main(["--config", str(file), "--jobs", "1"])
    plan = read_plan(file)
    chosen = json.loads((folder_of(plan, "then AGSM", 1) / "train" / "options.json").read_text())
    lora = folder_of(plan, "DPO", 1) / "train" / "lora"
    assert (
        chosen["merge_lora"] == str(lora) and (lora / "pytorch_lora_weights.safetensors").exists()
    )
    images = {}
    for method in ("base", "DPO", "then AGSM"):
        with np.load(folder_of(plan, method, 1) / "images.npz") as saved:
            images[method] = saved["images"].astype(float)
    # A rate of 0 leaves the tokens as drawn: small, so the pictures are those of the merged model.
    gap = np.abs(images["then AGSM"] - images["DPO"]).mean()
    assert gap < np.abs(images["then AGSM"] - images["base"]).mean()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(one["cfg"] == 2.0 and one["sweep"] == {} for one in results)  # none to choose from
    text = (tmp_path / "out" / "report.md").read_text()
    assert "All at guidance scale (CFG) 2." in text
    assert "## Against DPO, on the same" in text and "| at the end of training | impl" in text
    assert "| then AGSM | 0." in text.split("## Preference accuracy")[1].split("##")[0]
    row = next(line for line in text.splitlines() if line.startswith("| then AGSM | |"))
    assert row  # it has no such metric


def test_methods_that_train_all_of_the_denoiser(flow_base, tmp_path, monkeypatch):
    dpo = {
        "recipe": "train_dpo",
        "full": True,
        "num_tokens": 0,
        "learning_rate": 0.05,
        "beta": 50.0,
    }
    file = plan_file(
        tmp_path,
        flow_base,
        methods={
            "DPO": dpo,
            "all again": {"after": "DPO", "full": True, "num_tokens": 0, "learning_rate": 1e-30},
            "a LoRA": {"after": "DPO", "rank": 1, "num_tokens": 0, "learning_rate": 1e-30},
        },
        seeds=[0],
        guidance_scales=[2.0],
        categories=["counting", "colors"],
    )
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: _in_process(command))
    study.main(["--config", str(file), "--jobs", "1"])
    plan, images = read_plan(file), {}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| | CFG | overall | counting | colors |" in report and "counting 9, colors 2;" in report
    for method in ("base", *plan.methods):
        with np.load(folder_of(plan, method, 0) / "images.npz") as saved:
            images[method] = saved["images"].astype(int)
    assert np.abs(images["DPO"] - images["base"]).mean() > 1  # what was trained is what is scored
    for method in ("all again", "a LoRA"):  # a rate of 0 changes nothing of what they start from
        assert np.abs(images[method] - images["DPO"]).max() <= 1


def test_a_method_waits_for_the_one_it_comes_after(flow_base, tmp_path, monkeypatch):
    dpo = {"recipe": "train_dpo", "rank": 1, "num_tokens": 0}
    file = plan_file(tmp_path, flow_base, methods={"DPO": dpo, "then AGSM": {"after": "DPO"}})
    plan, ended = read_plan(file), []

    def call(command, **_):
        method, seed = command[command.index("--only") + 1], int(command[-1])
        if method == "DPO":
            time.sleep(0.2)
        if method == "then AGSM":
            assert ("DPO", seed) in ended
        summary = {"overall": 0.5, "categories": {"counting": {"score": 0.5}}}
        result = {"method": method, "seed": seed, "cfg": 1.0, "heldout": summary}
        (folder_of(plan, method, seed) / "result.json").write_text(json.dumps(result))
        ended.append((method, seed))
        return 0

    monkeypatch.setattr(run.subprocess, "call", call)
    run.run_all(file, plan, 4)
    assert set(ended) == set(jobs_of(plan))


def _in_process(command):
    study.main(command[2:])
    return 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stepz": 1}, "stepz"),
        ({"methods": {"AGSM": {"lrate": 1}}}, "AGSM: unknown keys .'lrate'"),
        ({"common": {"lrate": 1}}, "common"),
        ({"methods": {"base": {}}}, "untrained"),
        ({"methods": {"A": {}}, "references": {"Base": "m"}}, "untrained"),
        ({"methods": {"A": {}}, "references": {"A": "m"}}, "'A' and 'A' would share one folder"),
        ({"methods": {"A b": {}, "A_b": {}}}, "'A b' and 'A_b' would share one folder"),
        ({"methods": {"agsm": {}, "AGSM": {}}}, "share one folder"),
        *(
            ({"methods": {name: {}}}, "name that can name a folder .* got")
            for name in ("../../x", "/x", "a/b", "a\\b", "..", ".", "", " ", "a\nb", "a\0", "-x", 3)
        ),
        ({"references": {"../x": "m"}}, "name that can name a folder"),
        ({"methods": {"D": {"recipe": "train_foo"}}}, "D: recipe: expected one of"),
        ({"methods": {"D": {"recipe": "train_base"}}}, "recipe: expected one of .*train_agsm"),
        ({"methods": {"D": {"beta": 5.0}}}, "D: unknown keys .'beta'"),
        ({"common": {"beta": 5.0}}, "common, for AGSM: unknown keys .'beta'"),
        ({"methods": {"A": {"after": "D"}, "D": {}}}, "stands before it"),
        ({"methods": {"A": {}, "B": {"after": "A"}}}, "rank or full, and num_tokens: 0"),
        ({"baselines": ["D"]}, "baselines: unknown keys"),
        ({"categories": ["colors"]}, "categories: expected counting"),
        ({"categories": ["counting", "cats"]}, "categories: expected counting"),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        read_plan(plan_file(tmp_path, "m", **changes))
    (tmp_path / "short.yaml").write_text("model: m\n")
    with pytest.raises(ValueError, match="methods"):
        read_plan(tmp_path / "short.yaml")


@pytest.mark.parametrize("changes", [{}, {"references": {"ceiling": "runs/none/pipeline"}}])
def test_a_model_that_is_not_there_ends_a_study_before_its_runs(
    flow_base, tmp_path, monkeypatch, changes
):
    file = plan_file(tmp_path, flow_base if changes else "runs/none/pipeline", **changes)
    monkeypatch.setattr(run.subprocess, "call", None)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: runs/none/pipeline"):
        study.main(["--config", str(file)])


def test_a_changed_plan_does_not_take_over_old_results(tmp_path):
    dpo = {"recipe": "train_dpo", "full": True, "num_tokens": 0, "learning_rate": 0.1}
    methods = {"DPO": dpo, "then": {"after": "DPO"}, "AGSM": {"learning_rate": 0.01}}

    def changed(**changes):
        run.check_settings(plan := read_plan(plan_file(tmp_path, "m", **changes)), jobs_of(plan))

    plan = read_plan(plan_file(tmp_path, "m", methods=methods, references={"R": "r"}))
    run.check_settings(plan, jobs_of(plan))  # nothing is done yet
    for method, seed in jobs_of(plan):
        run.begin(plan, method, seed)
    kept = {"methods": methods, "references": {"R": "r"}}
    changed(**kept)
    changed(**kept, title="T", seeds=[0, 1, 2], panels={"loss": "loss"}, baselines=["DPO"])
    changed(methods={"AGSM": {"learning_rate": 0.01}, "new": {}})
    changed(**kept, pairs=0)

    def told(*lines, **changes):
        with pytest.raises(ValueError) as raised:
            changed(**kept | changes)
        text = str(raised.value)
        assert "Name another --output_dir, or delete" in text
        assert text.count("seed 0: ") == len(lines), text
        assert all(f"  {line}" in text for line in lines), text
        assert str(folder_of(plan, lines[0].split(",")[0], 0)) in text

    told(
        "AGSM, seed 0: options.learning_rate: 0.01 in the run, 0.02 in the plan",
        methods=methods | {"AGSM": {"learning_rate": 0.02}},
    )
    told(
        "DPO, seed 0: options.learning_rate: 0.1 in the run, 0.2",
        "then, seed 0: after.learning_rate: 0.1 in the run, 0.2",
        methods=methods | {"DPO": dpo | {"learning_rate": 0.2}},
    )
    told("R, seed 0: model: r in the run, q in the plan", references={"R": "q"})
    told("DPO, seed 0: pairs", "then, seed 0: pairs", "AGSM, seed 0: pairs", pairs=5)
    names = ("base", "R", "DPO", "then", "AGSM")
    told(*(f"{name}, seed 0: per_category: 2 in the run, 3" for name in names), per_category=3)
    for left in ("result.json", "train"):  # of a study that kept no settings
        folder = folder_of(plan, "AGSM", 0)
        (folder / "settings.json").unlink(missing_ok=True)
        (folder / left).mkdir()
        told("AGSM, seed 0: no settings.json")
        (folder / left).rmdir()


def test_a_study_refuses_before_it_runs_anything(tmp_path, monkeypatch):
    file = plan_file(tmp_path, "m")
    plan = read_plan(file)
    (folder_of(plan, "AGSM", 1) / "train").mkdir(parents=True)
    monkeypatch.setattr(run.subprocess, "call", lambda command, **_: pytest.fail("a run was begun"))
    for more in ([], ["--only", "AGSM", "--seed", "1"]):
        with pytest.raises(ValueError, match=r"AGSM, seed 1: no settings\.json"):
            study.main(["--config", str(file), *more])


@pytest.mark.parametrize("name", ["a | b <script>alert(1)</script>", "a $ b $\\foo$"])
def test_titles_and_names_are_text_in_every_report(name, tmp_path, monkeypatch):
    plan = Plan(
        "<i>m</i>", str(tmp_path), {name: {}}, per_category=1, guidance_scales=[1.0],
        categories=["counting"],
        title=f"{name}\n# two", baselines=[name], panels={name: "loss"}, frontier="reward",
    )  # fmt: skip
    score = {"overall": 0.5, "score": 0.5, "low": 0.4, "high": 0.6}
    counting = score | {"over": 0.5, "under": 0.0, "count_error": 0.5}
    result = {"cfg": 1.0, "heldout": score | {"categories": {"counting": counting}}, "correct": [1],
              "train_seconds": 90.0}  # fmt: skip
    results = [{"method": method, "seed": 0, **result} for method in ("base", name)]
    scores = score | {"categories": {"counting": counting}}
    log = [{"step": 1, "loss": 1.0, "reward": 1.0}, {"step": 1, "seconds": 2.0, "scores": scores}]
    for module in (report, figures):
        monkeypatch.setattr(module, "log_of", lambda *_: log)
    monkeypatch.setattr(report, "images_of", lambda *_: np.zeros((1, 8, 8, 3), np.uint8))
    text = report.markdown(plan, results, tmp_path / "plan.yaml")
    assert "Its trainings took 3 minutes in all" in text
    page = report.html_page(plan.title, text, tmp_path)
    body = page.split("<body>")[1]
    assert "<script" not in page and "<b>" not in body and "<i>" not in body
    assert body.count("<h1>") == 1 and html.escape(name) in body
    tables = [part.split("</table>")[0] for part in body.split("<table>")[1:]]
    assert sum(html.escape(name) in table for table in tables) == 6
    assert all(
        len(line.split("|")) == len(head.split("|"))
        for head, line in pairwise(text.splitlines())
        if head.startswith("|") and line.startswith("|")
    )
    figures.curves(plan, tmp_path / "curves.png")


def test_shipped_plans_are_read(recipes):
    for name, method in (
        ("lab/configs/study_flow", "SoftREPA"),
        ("lab/configs/study_epsilon", "SoftREPA"),
        ("configs/demo", "AGSM, s = 2"),
    ):
        assert method in read_plan(recipes / f"{name}.yaml").methods


def test_reports_are_of_the_shipped_studies(recipes):
    reports = sorted((recipes / "lab" / "results").glob("*/report.md"))
    assert len(reports) > 5
    for file in reports:
        plan = read_plan(recipes / "lab" / "configs" / f"{file.parent.name}.yaml")
        assert plan.output_dir == f"runs/{file.parent.name}"
        text = file.read_text()
        assert all(f"| {name} |" in text for name in plan.methods), file


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dpo", "dpo_flow"),
        ("dpo_epsilon", "dpo_epsilon"),
        ("inpo", "inpo_epsilon"),
        ("spo", "spo_epsilon"),
    ],
)
def test_plans_and_configs_of_the_hosts_say_the_same(name, config, recipes):
    from run.options import flags

    plan = read_plan(recipes / "lab" / "configs" / f"study_{name}.yaml")
    alone, joint, *_ = plan.methods.values()
    assert alone["recipe"] == joint["recipe"] == f"train_{config.split('_')[0]}"
    assert any(one.get("after") in plan.methods for one in plan.methods.values())
    options = recipe_of("", joint).OPTIONS
    file = recipes / "configs" / f"{config}.yaml"
    own = vars(options.parse(None, ["--config", str(file)]))
    told = {**plan.common, **joint, "model": plan.model, "output_dir": own["output_dir"]}
    told.pop("recipe")
    of_plan = vars(options.parse(None, flags(told)))
    assert own == of_plan
    assert joint["agsm_weight"] > 0 and alone.get("agsm_weight", 0) == 0
    assert all(alone[key] == joint[key] for key in alone if key != "num_tokens")


def test_intervals_over_seeds_and_over_pairs():
    mean, half = report.spread([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert np.isnan(report.spread([1.0])[1])
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    apart = np.arange(400)
    mean, half = report.paired(noise + 0.5, noise + 0.5 + 0.01 * rng.normal(size=400), apart)
    assert abs(mean) < 2 * half and half < 0.002  # what both share cancels


def test_images_of_one_prompt_count_as_one_draw():
    gaps = np.array([0.0, 1.0, 0.5, -1.0])
    mean, half = report.paired(gaps, np.zeros(4), np.arange(4))
    many, same = report.paired(np.repeat(gaps, 25), np.zeros(100), np.repeat(np.arange(4), 25))
    assert (mean, half) == pytest.approx((many, same))
    assert half == pytest.approx(3.182446 * gaps.std(ddof=1) / 2, rel=1e-5)
    assert np.isnan(report.paired(gaps, np.zeros(4), np.zeros(4))[1])


def test_a_frontier_sets_scores_beside_what_was_logged_before_them(tmp_path):
    plan = Plan("m", str(tmp_path), {"A": {}}, seeds=[0, 1], frontier="reward_mean")
    for seed, shift in ((0, 0.0), (1, 1.0)):
        folder = folder_of(plan, "A", seed) / "train"
        folder.mkdir(parents=True)
        lines = [
            {"step": 0, "scores": {"overall": 0.9}},  # nothing was logged before it
            {"step": 1, "reward_mean": 1.0 + shift},
            {"step": 2, "reward_mean": 3.0 + shift},
            {"step": 2, "seconds": 10.0 + 4 * shift, "scores": {"overall": 0.5}},
            {"step": 3, "reward_mean": 7.0 + shift},
            {"step": 3, "seconds": 20.0, "scores": {"overall": 0.3}},
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures.frontier(plan, "A") == [(2, 2.5, 0.5, 12.0), (3, 7.5, 0.3, 20.0)]
    assert "| A | 0.500 at 2.500, 12 s | 0.300 at 7.500, 20 s |" in report.frontier_table(plan)
    for seed in plan.seeds:  # a log of trl's DDPO before it had them
        file = folder_of(plan, "A", seed) / "train" / "log.jsonl"
        file.write_text(re.sub('"seconds": [0-9.]+, ', "", file.read_text()))
    assert "| A | 0.500 at 2.500 | 0.300 at 7.500 |" in report.frontier_table(plan)


def test_the_reward_of_the_heldout_pictures_stands_beside_their_score(tmp_path):
    """Where the methods train on a reward that needs no prompt."""
    plan = Plan("m", str(tmp_path), {"A": {}}, common={"reward": "redness"})
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0] = 255
    by_method = {}
    for name, shown in (("base", images[1:]), ("A", images)):
        folder = folder_of(plan, name, 0)
        folder.mkdir(parents=True)
        np.savez(folder / "images.npz", images=shown)
        by_method[name] = [{"seed": 0, "heldout": {"overall": 0.25}}]
    text = report.rewards_table(plan, by_method)
    assert "| base | 0.000 | 0.250 | " in text and "| A | 0.500 | 0.250 | " in text
    for reward in ("detector", "PickScore", ""):
        assert not report.rewards_table(Plan("m", "", {}, common={"reward": reward}), by_method)
