"""train_ddpo.py: resume, log, either kind of image, rewards, refusals."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset as Table
from PIL import Image
from recipe_runs import killing, log, trained

import train_ddpo
from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer
from data.task import Task
from lab.world.captions import caption
from lab.world.prompts import draw_spec
from lab.world.task import World
from rewards import rewards

pytestmark = [
    pytest.mark.filterwarnings("ignore:DDPOTrainer is deprecated"),
    pytest.mark.filterwarnings("ignore:.*_encode_prompt.* is deprecated"),
]
FEW = ["--rank", "2", "--num_tokens", "2", "--validation_per_category", "1",
       "--validation_inference_steps", "1", "--num_inference_steps", "3",
       "--candidates", "in_batch:2", "--reward", "redness", "--learning_rate", "0.01"]  # fmt: skip
DDPO = ["--num_epochs", "3", "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "1",
        "--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--agsm_batch", "3",
        "--validation_epochs", "9", "--checkpointing_epochs", "1"]  # fmt: skip


def train(model, folder, *flags):
    train_ddpo.main(["--model", str(model), "--output_dir", str(folder), *FEW, *flags])
    return trained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("images", ["data", "best"])
def test_a_killed_run_resumes_to_the_same_weights(images, epsilon_base, tmp_path, monkeypatch):
    negatives = {"data": "empty,in_batch:1,hard:1", "best": "empty"}[images]
    flags = [*DDPO, "--agsm_weight", "0.5", "--candidates", negatives, "--agsm_images", images,
             "--agsm_every", "3", "--per_prompt_stat_tracking",
             "--guidance_scale", "1", "--ema_decay", "0.9"]  # fmt: skip
    whole = train(epsilon_base, tmp_path / "whole", *flags)
    lines = log(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all({"reward/mean", "loss", "agsm/loss"} <= line.keys() for line in lines[:3])
    assert lines[3]["scores"]["n"] == 6 and lines[0]["agsm/loss"] > 0
    sheets = {file.name for file in (tmp_path / "whole" / "sheets").glob("*.png")}
    assert sheets == {"samples_000002.png", "000003.png"}
    redness = rewards.redness
    monkeypatch.setattr(rewards, "redness", killing(redness, 3))
    with pytest.raises(KeyboardInterrupt):
        train(epsilon_base, tmp_path / "cut", *flags)
    monkeypatch.setattr(rewards, "redness", redness)
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        train(epsilon_base, tmp_path / "cut", *flags)
    resumed = train(epsilon_base, tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert whole.keys() == resumed.keys() and any(name.startswith("lora/") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log(tmp_path / "cut") == lines


FOUR_STEPS = [*DDPO, "--num_epochs", "2", "--sample_num_batches_per_epoch", "2",
              "--gradient_accumulation_steps", "1",
              "--validation_epochs", "1", "--report_to", "tensorboard"]  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_logs_nothing_twice(epsilon_base, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(epsilon_base, tmp_path / "whole", *FOUR_STEPS)
    lines = log(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    # The first epoch has 12 micro-steps; here in the third step of the second.
    loss = AGSMDDPOTrainer.calculate_loss
    monkeypatch.setattr(AGSMDDPOTrainer, "calculate_loss", killing(loss, 20))
    with pytest.raises(KeyboardInterrupt):
        train(epsilon_base, tmp_path / "cut", *FOUR_STEPS)
    assert [line["step"] for line in log(tmp_path / "cut")] == [0, 0, 1, 2, 3, 4, 4]
    monkeypatch.setattr(AGSMDDPOTrainer, "calculate_loss", loss)
    again = [*FOUR_STEPS, "--resume_from_checkpoint", "latest"]
    train(epsilon_base, tmp_path / "cut", *again)
    assert log(tmp_path / "cut") == lines
    events = EventAccumulator(str(tmp_path / "cut" / "agsm-loss")).Reload()
    assert [one.step for one in events.Scalars("loss")] == [*range(8)]
    assert [one.step for one in events.Scalars("scores/overall")] == [0, 4, 8]


def test_rewards_that_are_no_numbers_end_the_run(epsilon_base, tmp_path, monkeypatch):
    scores = [1.0, float("nan")]
    monkeypatch.setattr(rewards, "redness", lambda pixels, prompts: (
        pixels.mean((1, 2, 3)) * scores.pop(0)))  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    flags = [*DDPO, "--sampling_prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(FloatingPointError, match=r"redness.*a red circle.*checkpoint_1\.$"):
        train(epsilon_base, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "tokens").exists() and len(log(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--train_timestep_fraction", "0.3"], "at least one of 3 sampling steps"),
        (["--reward", "redness:-1"], "a weight above 0"),
    ],
)
def test_what_would_train_nothing_or_backwards_is_refused_at_the_start(flags, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        train(tmp_path / "absent", tmp_path / "run", *DDPO, *flags)


def test_a_run_whose_rewards_never_differ_is_an_error(epsilon_base, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "redness", lambda pixels, prompts: torch.ones(len(pixels)))
    flags = [*DDPO, "--num_epochs", "2", "--checkpointing_epochs", "9"]
    with pytest.raises(ValueError, match="expected rewards that differ, got none in 2 rollouts"):
        train(epsilon_base, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "tokens").exists()


def test_a_signal_ends_a_run_after_its_epoch(epsilon_base, tmp_path, monkeypatch, capsys):
    whole = train(epsilon_base, tmp_path / "whole", *DDPO)
    redness = rewards.redness

    def asked(pixels, prompts):
        os.kill(os.getpid(), signal.SIGTERM)
        return redness(pixels, prompts)

    monkeypatch.setattr(rewards, "redness", asked)
    with pytest.raises(SystemExit, match="143"):
        train(epsilon_base, tmp_path / "cut", *DDPO)
    told = capsys.readouterr().out
    assert "Stopped after epoch 1, saved as " in told and "recipes/train_ddpo.py --" in told
    monkeypatch.setattr(rewards, "redness", redness)
    again = [*DDPO, "--resume_from_checkpoint", "latest"]
    # trl has a multiple of it, by an image's sampling steps.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    resumed = train(epsilon_base, tmp_path / "cut", *again)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


def test_with_guidance_and_all_of_the_model_it_trains_too(epsilon_base, tmp_path):
    flags = [*DDPO, "--num_epochs", "1", "--rank", "0", "--full", "--guidance_scale", "2",
             "--sample_num_batches_per_epoch", "2", "--report_to", "tensorboard",
             "--reward", "redness:2,jpeg_compressibility:0.5"]  # fmt: skip
    train(epsilon_base, tmp_path, *flags)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    first = log(tmp_path)[0]
    total = 2 * first["reward/redness"] + 0.5 * first["reward/jpeg_compressibility"]
    assert total == pytest.approx(first["reward/mean"], abs=1e-5)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"] > 0 for line in lines)
    assert (tmp_path / "pipeline" / "unet").is_dir() and log(tmp_path)[-1]["scores"]["n"] == 6


@pytest.mark.parametrize("flags", [
    ["--candidates", "hard:1"], ["--timestep_low", "0.5"], ["--candidates", "empty,in_batch:1"],
])  # fmt: skip
def test_what_its_own_samples_cannot_follow_is_refused(flags, epsilon_base, tmp_path):
    flags = [*DDPO, "--agsm_weight", "1", "--agsm_images", "best", *flags]
    with pytest.raises(ValueError, match=r"agsm_images"):
        train(epsilon_base, tmp_path, *flags)


def test_prompts_come_from_a_file(epsilon_base, tmp_path, monkeypatch):
    seen, redness = set(), rewards.redness

    def watching(pixels, prompts):
        seen.update(prompts)
        return redness(pixels, prompts)

    monkeypatch.setattr(rewards, "redness", watching)
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue squares\n")
    flags = [*DDPO, "--num_epochs", "2", "--sampling_prompts", str(tmp_path / "prompts.txt")]
    train(epsilon_base, tmp_path / "run", *flags)
    assert seen == {"a red circle", "two blue squares"}


def test_a_run_is_made_of_prompts_and_of_agsms_images(epsilon_base, tmp_path, monkeypatch):
    """Red and blue images under the same captions are other data, where AGSM trains on them."""
    found = []

    def opened(options, state, made_of):
        found.append(made_of["data"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ddpo, "opened", opened)
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        for i in range(4):
            Image.new("RGB", (24, 24), colour).save(tmp_path / colour / f"{i}.png")
            (tmp_path / colour / f"{i}.txt").write_text(f"caption {i}")
        for own in (["1"], ["1", "--agsm_images", "best", "--candidates", "in_batch:2"], ["0"]):
            flags = [*DDPO, "--data", str(tmp_path / colour), "--agsm_weight", *own]
            with pytest.raises(KeyboardInterrupt):
                train(epsilon_base, tmp_path / "run", *flags)
    assert found[0] != found[3] and found[1:3] == found[4:]


def test_a_flow_is_sent_to_its_own_recipe(flow_base, tmp_path):
    with pytest.raises(ValueError, match=r"train_flow_grpo"):
        train(flow_base, tmp_path, *DDPO)


def test_rewards_of_hand_made_pictures():
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 24, 24)
    grey = torch.zeros(1, 3, 24, 24)
    noisy = torch.rand(1, 3, 24, 24) * 2 - 1
    prompts = ["a", "b", "c"]
    pictures = torch.cat([red, grey, noisy])
    assert rewards.load("redness")(pictures, prompts)[:2].tolist() == pytest.approx([1.0, 0.0])
    sizes = rewards.load("jpeg_incompressibility")(pictures, prompts)
    assert sizes[2] > 1.5 * sizes[0] and sizes[0] > 0.3
    assert torch.equal(rewards.load("jpeg_compressibility")(pictures, prompts), -sizes)


def test_a_prompt_is_one_draw_of_its_row_or_of_its_scene(tmp_path):
    """From a file or a table uniformly; from the world by the seed of a scene."""
    lines = ["a red circle", "two blue squares", "a cat"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines))
    Table.from_dict({"caption": lines}).to_parquet(tmp_path / "table.parquet")
    table = Task(str(tmp_path / "table.parquet"))

    def scene(seed):
        return caption(draw_spec(np.random.default_rng(seed), "train"))

    for file, task, number, text in (
        (str(tmp_path / "prompts.txt"), table, 3, lines.__getitem__),
        ("", table, 3, lines.__getitem__),
        ("", World("world"), 2**31, scene),
    ):
        torch.manual_seed(4)
        expected = [(text(int(torch.randint(number, ()))), {}) for _ in range(8)]
        torch.manual_seed(4)
        draw = train_ddpo.drawn_prompts(SimpleNamespace(sampling_prompts=file), task)
        assert [draw() for _ in range(8)] == expected
