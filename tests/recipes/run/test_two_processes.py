"""Recipes on two processes: they neither hang nor drift apart."""

import pytest
import torch
import two_processes
from ranks import run_ranks
from recipe_runs import log

FEW = ["--validation_per_category", "1", "--validation_inference_steps", "1",
       "--num_tokens", "1", "--rank", "1", "--candidates", "in_batch:1",
       "--learning_rate", "0.01"]  # fmt: skip
LOOP = ["--validation_steps", "9", "--train_batch_size", "2", "--logging_steps", "1"]
SPO = ["--num_inference_steps", "3", "--first_step", "1", "--num_candidates", "2",
       "--threshold", "0"]  # fmt: skip


def launch(model, folder, recipe, found, flags):
    """Its log, after both processes have trained the same."""
    run = folder / "run"
    given = ["--output_dir", str(run), "--model", str(model), *FEW, *flags]
    first, second = run_ranks(two_processes.paired, 2, recipe, found, given).values()
    assert first and all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    return log(run)


@pytest.mark.slow
def test_spo_where_one_process_or_none_finds_a_pair(epsilon_base, tmp_path):
    lines = launch(
        epsilon_base, tmp_path, "train_spo", "b1nb", [*LOOP, "--max_train_steps", "4", *SPO]
    )
    # The mean of both processes.
    assert [line["spo/pairs"] for line in lines] == [2, 1, 0, 2]
    assert lines[0]["grad_norm"] > 0 and lines[1]["grad_norm"] > 0 and lines[2]["grad_norm"] == 0


@pytest.mark.slow
def test_dpo_with_agsm(flow_base, tmp_path):
    flags = [*LOOP, "--max_train_steps", "2", "--agsm_weight", "1", "--beta", "50",
             "--chunk_size", "3"]  # fmt: skip
    lines = launch(flow_base, tmp_path, "train_dpo", "", flags)
    assert all(line["grad_norm"] > 0 and line["agsm/loss"] > 0 for line in lines)


@pytest.mark.slow
def test_ddpo_with_agsm(epsilon_base, tmp_path):
    flags = ["--num_epochs", "2", "--validation_epochs", "9", "--reward", "redness",
             "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "1",
             "--train_batch_size", "4", "--num_inference_steps", "3", "--agsm_weight", "1",
             "--agsm_batch", "2"]  # fmt: skip
    lines = launch(epsilon_base, tmp_path, "train_ddpo", "", flags)
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[1]["agsm/loss"] > 0


@pytest.mark.slow
def test_nft_with_agsm_on_its_best_samples(flow_base, tmp_path):
    flags = [*LOOP, "--max_train_steps", "3", "--reward", "redness", "--group_size", "2",
             "--sample_batch_size", "4", "--sample_num_batches_per_epoch", "1",
             "--num_inference_steps", "3", "--agsm_weight", "1", "--agsm_images", "best",
             "--agsm_batch", "2"]  # fmt: skip
    lines = launch(flow_base, tmp_path, "train_nft", "", flags)
    assert all(line["grad_norm"] > 0 and line["agsm/loss"] > 0 for line in lines)
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"] != lines[2]["reward/mean"]
