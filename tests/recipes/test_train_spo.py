"""train_spo.py and the scores it asks: resume, AGSM on either kind of image, refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe_runs import killing, log, trained
from torch import nn

import train_spo
from data.batches import Batch, to_model
from lab.world import detector_reward
from lab.world.captions import caption
from lab.world.detector_reward import detector
from lab.world.prompts import scenes
from lab.world.render import render
from model.pipeline import TextToImage
from model.trained import TrainedModel
from rewards.rollout import Findings, dealt

FEW = ["--max_train_steps", "3", "--train_batch_size", "3", "--logging_steps", "1",
       "--validation_steps", "9", "--rank", "2", "--validation_per_category", "1",
       "--validation_inference_steps", "1", "--checkpointing_steps", "1", "--num_tokens", "2",
       "--candidates", "in_batch:2", "--num_inference_steps", "5",
       "--first_step", "2", "--num_candidates", "2", "--threshold", "0"]  # fmt: skip


def train(model, folder, *flags):
    train_spo.main(["--model", str(model), "--output_dir", str(folder), *FEW, *flags])
    return trained(folder)


def varied(pixels, prompts):
    """A preference for bright pictures: an untrained model draws no shapes."""
    return 100 * pixels.mean((1, 2, 3))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(epsilon_base, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_reward, "detector", varied)
    flags = ["--agsm_weight", "0.5", "--candidates", "empty,in_batch:1,hard:1",
             "--ema_decay", "0.9", "--agsm_images", "data", "--agsm_batch", "5",
             "--max_train_steps", "2"]  # fmt: skip
    whole = train(epsilon_base, tmp_path / "whole", *flags)
    last = log(tmp_path / "whole")[-1]
    assert last["spo/pairs"] > 0 and last["spo/found"] == 2 * 3 and last["agsm/loss"] > 0
    assert any(whole[name].any() for name in whole if "lora_B" in name)  # they begin at zero
    # of two scored states a step: in the second
    monkeypatch.setattr(detector_reward, "detector", killing(varied, 3))
    with pytest.raises(KeyboardInterrupt):
        train(epsilon_base, tmp_path / "cut", *flags)
    monkeypatch.setattr(detector_reward, "detector", varied)
    resumed = train(epsilon_base, tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_the_host_alone_samples_what_it_samples_beside_agsm(epsilon_base, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_reward, "detector", varied)
    one = ["--max_train_steps", "1"]
    train(epsilon_base, tmp_path / "host", *one)
    train(epsilon_base, tmp_path / "both", *one, "--agsm_weight", "1")
    host, both = log(tmp_path / "host"), log(tmp_path / "both")
    assert host[0]["spo/loss"] == both[0]["spo/loss"] and "agsm/loss" not in host[0]


@pytest.mark.slow
def test_agsm_takes_more_images_than_are_sampled(epsilon_base, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_reward, "detector", varied)
    seen, made = [], TrainedModel.agsm_batch

    def counted(self, batch, latents, *rest):
        seen.append((len(batch.captions), len(latents)))
        return made(self, batch, latents, *rest)

    monkeypatch.setattr(TrainedModel, "agsm_batch", counted)
    one = ["--max_train_steps", "1"]
    train(epsilon_base, tmp_path / "host", *one)
    train(epsilon_base, tmp_path / "more", *one, "--agsm_weight", "1", "--agsm_batch", "7")
    assert seen and set(seen) == {(7, 7)}
    host, more = log(tmp_path / "host"), log(tmp_path / "more")
    assert host[0]["spo/loss"] == more[0]["spo/loss"] and more[0]["agsm/loss"] > 0
    flags = ["--agsm_weight", "1", "--agsm_batch", "7", "--agsm_images", "best"]
    with pytest.raises(ValueError, match="agsm_batch"):
        train(epsilon_base, tmp_path / "both", *flags)


@pytest.mark.parametrize(
    ("share", "kept", "others"), [(0.5, 2, "empty"), (0.1, 1, "in_batch:1"), (1.0, 3, "in_batch:1")]
)
def test_agsm_takes_the_best_of_a_rollout(share, kept, others, epsilon_base, tmp_path, monkeypatch):
    """Of three images; a single one still has the others' captions to compete with."""
    from model import trained as pipelines

    scored, taken = [], []

    def scores(pixels, prompts):
        scored.append((pixels, varied(pixels, prompts)))
        return scored[-1][1]

    make = pipelines.AGSMBatch

    def seen(*args, **kwargs):
        taken.append((args, kwargs))
        return make(*args, **kwargs)

    monkeypatch.setattr(detector_reward, "detector", scores)
    monkeypatch.setattr(pipelines, "AGSMBatch", seen)
    flags = ["--agsm_weight", "1", "--agsm_images", "best", "--agsm_best", str(share)]
    train(epsilon_base, tmp_path / "run", *flags, "--max_train_steps", "1", "--candidates", others)
    pixels, values = scored[-1]  # of the last states, after the candidates'
    assert len(values) == 3 and len(taken) == 1
    rows = values.argsort(descending=True)[:kept].sort().values
    latents, timesteps, noise, text = taken[0][0]
    captions = taken[0][1]["captions"]
    assert latents.shape == noise.shape and len(latents) == len(timesteps) == kept
    alike = torch.nn.functional.cosine_similarity(
        latents.flatten(1).unsqueeze(1), pixels.flatten(1).unsqueeze(0), dim=2
    )
    assert alike.argmax(1).tolist() == rows.tolist()
    if others == "empty":
        assert len(captions) == len(text["prompt_embeds"]) == kept
    else:
        assert captions.pool_size == 3 and captions.index[:, 0].tolist() == rows.tolist()
        assert captions.mask.all() and captions.index.shape == (kept, 2)
    last = log(tmp_path / "run")[-1]
    assert last["agsm/images_score"] == pytest.approx(values[rows].mean().item(), rel=1e-5)


def test_a_run_without_a_pair_is_an_error(epsilon_base, tmp_path, monkeypatch):
    """As of --reward hpsv2, a cosine, at the published threshold."""
    monkeypatch.setattr(detector_reward, "detector", lambda pixels, prompts: (
        0.01 * varied(pixels, prompts)))  # fmt: skip
    with pytest.raises(ValueError, match=r"none in 3 rollouts.*--threshold"):
        train(epsilon_base, tmp_path / "run", "--threshold", "0.9")
    print(log(tmp_path / "run"))
    assert not (tmp_path / "run" / "lora").exists()


def test_the_first_steps_may_have_no_pair(monkeypatch):
    monkeypatch.setattr(Findings, "MOST", 3)
    pairs = Findings("pairs", "Take more.")
    pairs.check()
    for number in (0, 0, 1, 0, 0, 0):
        pairs.saw(number)
    pairs.check()
    pairs = Findings("pairs", "Take more.")
    with pytest.raises(ValueError, match=r"expected pairs, got none in 3 rollouts.*Take more\."):
        for number in (0, 0, 0):
            pairs.saw(number)


def test_what_would_find_no_pair_is_refused_at_the_start(tmp_path):
    """The model that is not there is not looked for."""
    with pytest.raises(ValueError, match=r"first_step: expected a step of 0\.\.1.*no pairs"):
        train(tmp_path / "absent", tmp_path / "run", "--num_inference_steps", "3")


def test_scores_that_are_no_numbers_end_the_run(epsilon_base, tmp_path, monkeypatch):
    monkeypatch.setattr(detector_reward, "detector", lambda pixels, prompts: (
        math.nan * torch.ones(len(pixels))))  # fmt: skip
    with pytest.raises(FloatingPointError, match="expected finite numbers of detector"):
        train(epsilon_base, tmp_path / "run")


@pytest.mark.usefixtures("fresh_accelerate")
def test_vae_encoders_and_rewards_run_in_their_own_precision(epsilon_base, tmp_path, monkeypatch):
    """Autocast would run this VAE and reward in bfloat16, whose numbers have 8 bits."""
    seen = []

    def scores(pixels, prompts):
        found = nn.functional.linear(pixels.flatten(1), torch.ones(1, pixels[0].numel()))
        seen.append((torch.is_autocast_enabled("cpu"), found.dtype))
        return found[:, 0]

    def watched(module, *_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.float32))

    loaded = TextToImage.load.__func__

    def load(cls, *args):
        made = loaded(cls, *args)
        for part in (made.pipe.vae.decoder, made.pipe.vae.encoder, made.pipe.text_encoder):
            part.register_forward_pre_hook(watched)
        return made

    monkeypatch.setattr(detector_reward, "detector", scores)
    monkeypatch.setattr(TextToImage, "load", classmethod(load))
    flags = ["--mixed_precision", "bf16", "--max_train_steps", "1", "--agsm_weight", "1"]
    train(epsilon_base, tmp_path / "run", *flags)
    assert len(seen) > 6 and set(seen) == {(False, torch.float32)}


def test_a_flow_is_refused(flow_base, tmp_path):
    with pytest.raises(ValueError, match=r"Use train_dpo\.py"):
        train(flow_base, tmp_path / "run")


def test_shipped_configs_parse(recipes):

    files = sorted((recipes / "configs").glob("spo_sd*.yaml"))
    assert len(files) == 2
    for file in files:
        options = train_spo.OPTIONS.parse("", ["--config", str(file)])
        assert options.rank == 4 and "PickScore" in options.reward


def test_the_detector_scores_what_it_sees():
    stream = scenes(0, "train")
    drawn = [next(stream) for _ in range(20)]
    pixels = torch.from_numpy(to_model(np.stack([render(scene) for _, scene in drawn])))
    told = [caption(spec) for spec, _ in drawn]
    assert (detector(pixels, told) == 1).all()
    counts = detector(pixels[:1].repeat(3, 1, 1, 1), ["a circle", "two circles", told[0]])
    assert counts[2] == 1 and (counts[:2] < 1).any()
    assert (detector(-torch.ones(1, 3, 24, 24), ["three squares"]) == -3).all()
    with pytest.raises(ValueError, match="captions of the embedded world"):
        detector(pixels[:1], ["a cat"])


def test_a_share_of_the_samples_is_not_rounded_up_by_a_rounding_error():
    """0.07 * 100 is above 7."""
    alone = SimpleNamespace(num_processes=1, process_index=0)
    texts = Batch(torch.zeros(100, 3, 2, 2), ["a dog"] * 100, list(range(100)), [[]] * 100)
    latents, scores = torch.randn(100, 2), torch.arange(100.0)
    shown, moved, kept, few = dealt(alone, texts, latents, scores, 0.07)
    assert kept.tolist() == few.tolist() == list(range(93, 100))
    assert torch.equal(moved[kept], latents[kept]) and shown.image_ids == texts.image_ids
