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
    given = ["--output_dir", str(tmp_path), "--model", str(flow_base), *FEW, *flags]
    first, second = run_ranks(two_processes.best, 2, given).values()
    assert first[0] and all(torch.equal(*pair) for pair in zip(first[0], second[0], strict=True))
    lines = log(tmp_path)
    assert all(line["grad_norm"] > 0 and line["agsm/loss"] > 0 for line in lines)
    assert lines[0]["reward/mean"] == lines[1]["reward/mean"] != lines[2]["reward/mean"]
    best = second[1]  # the rollouts of the process with the better rewards
    assert len(best) == 2
    for _, _, shown, _ in (first, second):
        for batch, rollout in zip(shown, (best[0], best[0], best[1]), strict=True):
            assert all(any(torch.equal(one, row) for row in rollout) for one in batch)
    assert not torch.equal(first[2][0], second[2][0])  # each draws its own
    both, one = zip(first[3], second[3], strict=True)
    # Of scores 0 6 0 5 and 1 9 7 8 the best four, in their order, are dealt to both in turn.
    assert [shown[0] for shown in both] == [
        ["a of 0", "b of 0", "d of 0", "c of 1"],
        ["c of 0", "a of 1", "b of 1", "d of 1"],
    ]
    assert [shown[2].tolist() for shown in both] == [[1, 12], [11, 13]]
    assert [shown[3].tolist() for shown in both] == [[6, 7], [9, 8]]
    assert len({*both[0][1], *both[1][1]}) == 8  # other images
    assert [shown[2].tolist() for shown in one] == [[13], [13]]
