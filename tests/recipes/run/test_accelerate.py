"""Recipes under `accelerate launch` with the configs that are shipped, on two CPU processes.

Each run trains, validates, checkpoints and saves. An engine's first task is also killed in its
fourth step and resumed. Two engines share a launch: the second is asked for as its config does.
"""

import importlib
import importlib.util
import json
import shutil
from types import SimpleNamespace

import fresh
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from joint import joint
from loop_runs import OPTIONS
from recipe_runs import log
from safetensors.torch import load_file

from run import engines
from run.loop import Run

FEW = ["--max_train_steps", "4", "--train_batch_size", "3", "--logging_steps", "1",
       "--validation_steps", "4", "--validation_per_category", "1",
       "--validation_inference_steps", "1", "--checkpointing_steps", "2",
       "--candidates", "empty,in_batch:2",  # all others: no draw
       "--learning_rate", "0.01"]  # fmt: skip
DPO = ["--agsm_weight", "1", "--beta", "50"]
TASKS = {  # recipe, flags
    "lora": (
        "train_dpo",
        ["--num_tokens", "1", "--rank", "1", "--chunk_size", "4", "--gradient_checkpointing", *DPO],
    ),
    "full": ("train_agsm", ["--num_tokens", "0", "--full"]),
    "reference": ("train_dpo", ["--num_tokens", "0", "--full", *DPO]),
}
slow = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
LAUNCHES = [  # engine -> tasks; the first is the launch's own
    pytest.param({"fsdp2": ("lora", "full"), "ddp": ("lora",)}, id="fsdp2"),
    pytest.param(
        {"zero3": ("reference", "lora"), "zero2": ("full",)},
        id="zero3",
        marks=[slow, needs_deepspeed],
    ),
]


def flags(task, folder, model, *more):
    recipe, own = TASKS[task]
    return recipe, ["--model", str(model), "--output_dir", str(folder), *FEW, *own, *more]


def asked(engine, recipes):
    """What `accelerate launch` puts into the environment for the engine's config."""
    config = load_config_from_file(str(recipes / "configs" / "accelerate" / f"{engine}.yaml"))
    if config.distributed_type == DistributedType.DEEPSPEED:
        return {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(config.deepspeed_config["zero_stage"])}
    return {"ACCELERATE_USE_FSDP": str(config.distributed_type == DistributedType.FSDP).lower()}


def launch(engine, folder, runs, recipes):
    """The runs in one launch; how each ended."""
    file = folder / "runs.json"
    names = ("recipe", "flags", "kill", "environment")
    file.write_text(json.dumps([dict(zip(names, run, strict=True)) for run in runs]))
    config = recipes / "configs" / "accelerate" / f"{engine}.yaml"
    script = recipes.parent / "tests" / "helpers" / "accelerated.py"
    flags = ["--config_file", config, "--mixed_precision", "no", script, file]
    own = {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "1"}
    fresh.run(fresh.module, "accelerate.commands.launch", *flags, OMP_NUM_THREADS="1", **own)
    return json.loads(file.with_suffix(".told").read_text())


def train(engines_of, folder, model, recipes):
    """Each engine's tasks in whole, its first one also killed and resumed, in one launch.

    ZeRO-2 resumes as ZeRO-3 does.
    """
    runs, expected, resumed = [], [], ("--resume_from_checkpoint", "latest")
    for engine, tasks in engines_of.items():
        environment, own = asked(engine, recipes), folder / engine
        for task in tasks:
            runs.append((*flags(task, own / task, model), None, environment))
            expected.append("done")
        if engine == "zero2":
            continue
        cut = own / f"{tasks[0]}_cut"
        runs.append((*flags(tasks[0], cut, model), 4, environment))
        runs.append((*flags(tasks[0], cut, model, *resumed), None, environment))
        # On one process the error is raised before the others wait for it.
        runs.append((*flags(tasks[0], cut, model, *resumed, "--seed", "1"), None, environment))
        expected += ["killed", "done", "ValueError"]
    told = launch(next(iter(engines_of)), folder, runs, recipes)
    assert [one.split(":")[0] for one in told] == expected
    assert all("seed 0 -> 1" in one for one in told if one.startswith("ValueError"))


def both_batches(recipe, its_flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with joint():
        importlib.import_module(recipe).main([*its_flags, "--gradient_accumulation_steps", "2"])


def weights(folder):
    return {
        f"{file.parent.name}/{name}": value
        for part in ("tokens", "lora", "pipeline/transformer")
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def apart(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours and ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize("engines_of", LAUNCHES)
def test_recipes_in(engines_of, flow_base, recipes, tmp_path):
    """In one test, as the engines are launched once."""
    train(engines_of, tmp_path, flow_base, recipes)
    alone = set()
    for engine, tasks in engines_of.items():
        folder, first = tmp_path / engine, tasks[0]
        if engine != "zero2":
            assert apart(folder / first, folder / f"{first}_cut") == 0
            assert log(folder / first) == log(folder / f"{first}_cut")
        for task in tasks:
            equals_one_process(task, folder, tmp_path / "one", flow_base, task not in alone)
            alone.add(task)
        goes_on_in_one_process(engine, first, folder, flow_base)
        if {"full", "lora"} <= {*tasks}:
            stock_diffusers_loads(folder, flow_base)


def equals_one_process(task, folder, one, model, first):
    """Two processes, and one that trained on both's batches: in one, made the first time."""
    if first:
        both_batches(*flags(task, one / task, model))
    assert apart(folder / task, one / task) < 3e-5
    ours, theirs = log(folder / task), log(one / task)
    for place in (0, -1):
        assert ours[place]["scores"] == theirs[place]["scores"]
    norms = [[line["grad_norm"] for line in lines[1:]] for lines in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and min(norms[0]) > 0


def goes_on_in_one_process(engine, task, folder, model):
    """From the second step's checkpoint; DeepSpeed's is for its own number, which is refused."""
    run = folder / "went_on"
    shutil.copytree(folder / task, run)
    shutil.rmtree(run / "checkpoints" / "checkpoint_4")
    # One process sees both batches only by this.
    stored = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps(stored | {"gradient_accumulation_steps": 2}))
    resumed = flags(task, run, model, "--resume_from_checkpoint", "latest")
    if engine.startswith("zero"):
        with pytest.raises(ValueError, match=rf"{engine}_of_2.*got no DeepSpeed"):
            both_batches(*resumed)
    else:
        both_batches(*resumed)
        assert apart(folder / task, run) < 3e-5


def stock_diffusers_loads(folder, model):
    code = """
import sys
from diffusers import StableDiffusion3Pipeline
whole, base, lora = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(whole)
pipe("a red circle", num_inference_steps=1, max_sequence_length=1, output_type="np")
pipe = StableDiffusion3Pipeline.from_pretrained(base)
pipe.load_lora_weights(lora)
assert any("lora_A" in name for name, _ in pipe.transformer.named_parameters())
"""
    saved = [folder / "full" / "pipeline", model, folder / "lora" / "lora"]
    fresh.run(fresh.code, code, *saved)


@pytest.mark.parametrize(
    ("environment", "sharding", "match"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, True, "fsdp_version: expected 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            },
            True,
            "fsdp_cpu_ram_efficient_loading: expected false",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "expected one process or DDP, got FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, "got DeepSpeed.*ddp.yaml"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, False, "mixed_precision: expected bf16.*got no"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"},
            True,
            "gradient_accumulation_steps: expected 8.*got 1. Give --gradient_accumulation_steps 8",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, True, "dynamo_backend: .* Take --compile"),
    ],
)
def test_what_the_launcher_asks_for_is_refused_at_once(
    monkeypatch, environment, sharding, match, tmp_path
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=match):
        Run(OPTIONS.make(output_dir=str(tmp_path)), sharding=sharding)


def test_what_the_launcher_says_as_the_options_do_is_taken(monkeypatch):
    environment = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "8"}
    for name, value in {**environment, "DYNAMO_BACKEND": "NO"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    chosen = OPTIONS.make(mixed_precision="bf16", gradient_accumulation_steps=8)
    engines.check_launched(chosen, sharding=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the launcher's default
    engines.check_launched(chosen, sharding=True)


def deepspeed(**config):
    """An accelerator with this DeepSpeed config."""
    plugin = SimpleNamespace(deepspeed_config=config)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)


def test_the_options_rule_deepspeeds_config():
    chosen = OPTIONS.make(gradient_accumulation_steps=2, max_grad_norm=0.5, train_batch_size=3)
    accelerator = deepspeed(gradient_clipping="auto")
    engines.fit(accelerator, chosen)
    assert accelerator.state.deepspeed_plugin.deepspeed_config == {
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 3,
    }
    with pytest.raises(ValueError, match="gradient_clipping of DeepSpeed's config: expected"):
        engines.fit(deepspeed(gradient_clipping=1.0), chosen)
    with pytest.raises(ValueError, match="--gradient_accumulation_steps 4"):
        engines.fit(deepspeed(gradient_accumulation_steps=4), chosen)
