"""The READMEs' code runs, their commands and links exist, and they stay short."""

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import readme
import torch

from agsm_loss import AGSMLoss, AGSMRegularizer
from agsm_loss.integrations.denoisers import PlainDenoiser

ROOT = readme.ROOT
RECIPES = ROOT / "recipes"
QUICKSTART = RECIPES / "quickstart.py"
every_readme = pytest.mark.parametrize("name", readme.NAMES)
as_users_run_it = pytest.mark.unchecked_shapes


# What the blocks of a README call "yours" is made here: tiny pipelines of the stock classes, and
# batches that fit them. The blocks run in order, in one namespace, in an empty folder.


def loaded(kind, folder, dtype=torch.float32):
    from diffusers import DiffusionPipeline
    from pipelines_tiny import speaking_pipeline

    saved = speaking_pipeline(kind, folder)
    parts = json.loads((saved / "model_index.json").read_text())
    absent = {name: None for name, part in parts.items() if part == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(saved, **absent, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, saved


@as_users_run_it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd3", "unet", "unet_sdxl", "flux", "flux2", "sana"])
def test_the_blocks_of_the_readme_train_any_pipeline(kind, dtype, tmp_path, monkeypatch):
    """The LoRA is trained at the first attempt, in float32, and nothing else."""
    pipe, _ = loaded(kind, tmp_path / kind, dtype)
    monkeypatch.chdir(tmp_path)
    latents = torch.randn(3, {"flux": 1, "flux2": 8}.get(kind, 4), 8, 8)
    model = pipe.components.get("transformer") or pipe.unet
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    namespace = {"pipe": pipe, "batches": [(latents, ["a cat", "two cats", ""])] * 2}
    readme.run("README.md", namespace)
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = [name for name in after if "lora_B" in name]
    still = [name for name in trained if not after[name].any()]
    # SD3's last block throws away what the text's queries are for.
    assert {after[name].dtype for name in trained} == {torch.float32}
    assert next(model.parameters()).dtype == dtype and namespace["out"].loss.isfinite()
    assert trained and [name.split(".")[-4] for name in still] == ["add_q_proj"] * (kind == "sd3")
    assert namespace["agsm"].loss.guidance_scale == 2


def of_unet(pipe):
    """What the blocks for a UNet call yours."""

    def encode(texts):
        return pipe.encode_prompt(texts, "cpu", 1, False)[0]

    captions = ["two circles", "a cat"]
    tensors = "noisy", "target", "winner", "loser", "noise"
    return {
        "scheduler": pipe.scheduler,
        "optimizer": torch.optim.SGD(pipe.unet.parameters(), 1e-3),
        "captions": captions,
        "encode": encode,
        "conditioning": {"prompt_embeds": encode(captions)},
        "empty": {"prompt_embeds": encode(["", ""])},
        "empty_prompt_embeds": encode([""]),
        "timesteps": torch.tensor([100, 800]),
        **dict(zip(tensors, torch.randn(5, 2, 4, 8, 8), strict=True)),
    }


@as_users_run_it
def test_the_blocks_of_the_integrations_run(tmp_path, monkeypatch):
    pipe, _ = loaded("unet", tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Parameter(torch.randn(2, 4, 16)), "soft_tokens.pth")
    torch.save(torch.nn.Embedding(100, 16), "soft_t_tokens.pth")
    readme.run("integrations/README.md", {"pipe": pipe, **of_unet(pipe)})


@as_users_run_it
@pytest.mark.filterwarnings("ignore:DDPOTrainer is deprecated")
@pytest.mark.filterwarnings("ignore:.*_encode_prompt.* is deprecated")
def test_the_blocks_of_the_hosts_run(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from accelerate import PartialState
    from diffusers import FlowMatchEulerDiscreteScheduler
    from integrations_tiny import tiny
    from trl import DDPOConfig, DefaultDDPOStableDiffusionPipeline

    from agsm_loss.integrations.hosts.base import AGSMBatch

    PartialState(cpu=True)  # trl logs before it has made its accelerator
    pipe, saved = loaded("unet", tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    yours = of_unet(pipe)
    encode = yours["encode"]

    def data(number):
        latents, noise = torch.randn(2, 2, 4, 8, 8)
        text = {"prompt_embeds": encode(["a cat", "two cats"])}
        captions, null = ["a cat", "two cats"], {"prompt_embeds": encode([""])}
        return AGSMBatch(latents, torch.tensor([9, 700]), noise, text, captions, null=null)

    flow = PlainDenoiser(tiny("sd3", torch.float32).model.requires_grad_(True))
    flow_text = {"prompt_embeds": torch.randn(4, 6, 16), "pooled_prompt_embeds": torch.randn(4, 12)}
    flow_null = {name: torch.zeros_like(rows[:1]) for name, rows in flow_text.items()}
    latents, flow_noise = torch.randn(2, 4, 4, 8, 8)
    times = torch.tensor([10.0, 200.0, 600.0, 900.0])
    readme.run(
        "integrations/hosts/README.md",
        {
            **yours,
            "unet": pipe.unet.requires_grad_(False),
            "score": lambda latents, rows, timesteps: 9 * torch.randn(len(latents)),
            "config": DDPOConfig(
                num_epochs=1,
                mixed_precision="no",
                sample_num_steps=3,
                sample_batch_size=4,
                sample_num_batches_per_epoch=1,
                train_batch_size=2,
                project_kwargs={"project_dir": str(tmp_path)},
            ),
            "reward": lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}),
            "prompts": lambda: ("a cat", {}),
            "pipeline": DefaultDDPOStableDiffusionPipeline(str(saved), use_lora=True),
            "data": data,
            "flow_denoiser": flow,
            "flow_scheduler": FlowMatchEulerDiscreteScheduler(),
            "flow_agsm": AGSMRegularizer(flow, loss=AGSMLoss(guidance_scale=3)),
            "flow_noise": flow_noise,
            "flow_conditioning": flow_text,
            "flow_timesteps": times,
            "flow_images": AGSMBatch(
                latents, times, flow_noise, flow_text, ["a", "b", "c", "d"], null=flow_null
            ),
            "denoise": lambda x, times: flow(x, times, flow_text, 0),
            "rewards_of": lambda latents: latents.mean((1, 2, 3)),
        },
    )


@as_users_run_it
@pytest.mark.parametrize("name", [*readme.RECIPES[1:], *readme.RESULTS])
def test_the_blocks_of_the_recipes_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme.run(name, {})


# What a first step has less of here.
SHORT = {
    "train_agsm": "--max_train_steps 1 --train_batch_size 2 --validation_per_category 1",
    "generate": "--num_inference_steps 1 --prompts world:heldout:1",
    "score_images": "",
}


@as_users_run_it
@pytest.mark.slow
def test_the_first_steps_run(tmp_path, monkeypatch):
    """From the clone's root: every command, and the blocks of the file after them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(RECIPES)
    section = re.search(
        r"^## First steps$(.*?)^## ", readme.text_of("recipes/README.md"), re.DOTALL | re.MULTILINE
    )
    commands = re.findall(r"^python recipes/(\w+)\.py (.*)$", section[1], re.MULTILINE)
    commands = [
        one for one in commands if "recipes/lab/models" in one[1] or one[0] == "score_images"
    ]
    assert len(commands) == 4  # the others need weights
    for name, flags in commands:
        importlib.import_module(name).main([*shlex.split(flags), *SHORT[name].split()])
    readme.run("recipes/README.md", {})
    for made in ("pictures/sheet.png", "lora.png", "scored/lora_scale_1/scores.md"):
        assert (tmp_path / "runs" / made).exists()


@as_users_run_it
@pytest.mark.parametrize("model", ["flow", "flow_clean", "epsilon", "epsilon_clean"])
def test_the_block_of_a_model_card_runs_as_it_stands(model, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    readme.run(f"recipes/lab/models/{model}/README.md", namespace)
    assert namespace["image"].size == (24, 24)


@pytest.mark.slow
def test_the_quickstart_shows_a_falling_loss():
    done = subprocess.run(
        [sys.executable, "-W", "error", QUICKSTART], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"loss ([\d.]+)  matching caption ranked first ([\d.]+)", done.stdout)
    losses, won = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    assert losses[-1] < 0.5 * losses[0] and won[-1] > won[0]


# Commands, files and links.


@every_readme
def test_the_make_targets_exist(name):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {one.split()[1] for one in readme.code(name) if one.startswith("make ")}
    assert named <= targets


# python -m recipes.lab....
LAB = ["train_base", "train_rivals", "fuzz", "studies.negative"]
LAB += ["bench.loss", "bench.step", "bench.hosts"]


@pytest.fixture(scope="module")
def flags():
    """Command -> the flags that its --help names, with underscores."""
    commands = {file.name: file.stem for file in sorted(RECIPES.glob("*.py"))}
    del commands[QUICKSTART.name]  # it has no options
    commands |= {f"recipes.lab.{name}": f"lab.{name}" for name in LAB}
    found = {}
    for command, module in commands.items():
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [command, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(module).main()
        found[command] = {one.replace("-", "_") for one in re.findall(FLAG, printed.getvalue())}
    return found


FLAG = r"(?<=--)[a-z][\w-]*"
# Of the patch guide: a script's and git's; accelerate's launcher's.
THEIRS = {"proportion_empty_prompts", "unidiff_zero", "config_file", "num_processes"}
COMMAND = (
    r"(?:(?:python |accelerate launch )?(?:recipes/)?(\w+\.py)"
    r"|(?:python|accelerate launch) -m (recipes\.lab\.[\w.]+))(?!\S)"
)


@every_readme
def test_the_commands_and_their_flags_exist(name, flags):
    everything = set().union(*flags.values()) | THEIRS
    for one in readme.code(name):
        one = re.sub(r"^accelerate launch --config_file \S+", "accelerate launch", one)
        command = re.match(COMMAND, one)
        called = command and (command[1] or command[2])
        if one.startswith(("python ", "accelerate launch ")):
            assert called in flags or called == QUICKSTART.name, one
        known = flags.get(called, set()) if called and "--" in one else everything
        named = {flag.replace("-", "_") for flag in re.findall(FLAG, one)}
        assert named <= known, (one, named - known)


def test_every_command_of_the_lab_is_known():
    named = {
        ".".join(file.relative_to(RECIPES / "lab").with_suffix("").parts)
        for file in (RECIPES / "lab").rglob("*.py")
        if "__main__" in file.read_text()
    }
    assert named == {*LAB, "studies.forest"}  # which has no options


@pytest.mark.parametrize("name", readme.RECIPES)
def test_the_training_commands_have_all_that_they_need(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for one in readme.code(name):
        command = re.match(r"(?:python|accelerate launch.*) recipes/(train_\w+)\.py (.*)", one)
        if command:
            recipe = importlib.import_module(command[1])
            recipe.OPTIONS.parse(None, shlex.split(command[2]))


@every_readme
def test_the_files_exist(name):
    names = {file.name for file in (ROOT / "tests").rglob("*.py")}
    for one in readme.code(name):
        for config in re.findall(r"\b([a-z]\w*\.yaml)\b", one):
            folders = RECIPES / "configs", RECIPES / "lab" / "configs"
            assert any(list(folder.rglob(config)) for folder in folders), one
        for path in re.findall(r"\b(?:agsm_loss|integrations|recipes|tests)/[\w./]+\w", one):
            assert (ROOT / path).exists(), one
        assert not re.fullmatch(r"test_\w+\.py", one) or one in names


@every_readme
def test_the_links_lead_somewhere(name):
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", readme.prose(name)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in readme.anchors(target.resolve().relative_to(ROOT).as_posix()), link


# Length.


def test_the_readme_is_read_in_one_sitting():
    assert readme.text_of("README.md").count("\n") <= 180


@every_readme
def test_paragraphs_are_short(name):
    assert [number for number, lines in readme.paragraphs(name) if len(lines) > 5] == []


@every_readme
def test_every_table_has_a_caption_of_one_line(name):
    paragraphs = dict(readme.paragraphs(name))
    for line in readme.tables(name):
        caption = paragraphs.get(line - 2, [])
        assert len(caption) == 1 and caption[0].endswith("."), f"{name}:{line}"
