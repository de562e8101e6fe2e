"""trl's DDPOTrainer with AGSM in its loss: λ = 0, the term, accumulation, own samples, resume."""

import importlib.metadata
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from pipelines_tiny import saved_pipeline
from ranks import run_ranks

pytest.importorskip("trl")

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch
from agsm_loss.integrations.hosts import trl_ddpo
from agsm_loss.integrations.hosts.base import AGSMBatch, agsm_on
from agsm_loss.integrations.hosts.ddpo_parts import BestSamples
from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer
from agsm_loss.integrations.prompts import caption_ids
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:DDPOTrainer is deprecated"),
    pytest.mark.filterwarnings("ignore:.*_encode_prompt.* is deprecated"),
]
PROMPTS = ["a red circle", "two blue circles", "a cat", "a blue square"]
ACCUMULATED = 2 * 3  # micro-steps of an optimizer step: accumulation times timesteps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_pipeline("unet", tmp_path_factory.mktemp("sd"))


def config(tmp_path, **changed):
    settings = {
        "num_epochs": 2,
        "seed": 3,
        "mixed_precision": "no",
        "project_kwargs": {
            "project_dir": str(tmp_path),
            "automatic_checkpoint_naming": True,
        },
        "sample_num_steps": 3,
        "sample_batch_size": 4,
        "sample_num_batches_per_epoch": 1,
        "train_batch_size": 2,
        "train_gradient_accumulation_steps": 2,
        "train_learning_rate": 1e-2,
        "train_clip_range": 0.1,
        "save_freq": 100,
    }
    return DDPOConfig(**settings | changed)


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}


def asked():
    return PROMPTS[int(torch.randint(4, ()))], {}


def pipeline(folder, lora=True):
    PartialState(cpu=True)  # trl logs before it has made its accelerator
    torch.manual_seed(0)
    return DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=lora)


def soft_tokens(pipe):
    torch.manual_seed(1)
    return attach_soft_tokens(pipe.unet, make_soft_tokens(pipe.unet, num_tokens=2, std=0.5))


def regularizer(weight=1.0, **settings):
    def make(denoiser, parameters):
        return AGSMRegularizer(
            denoiser,
            EMA(parameters, decay=0.5),
            AGSMLoss(neg_scale=0.1),
            weight=weight,
            negatives_train=parameters,
            seed=0,
            **{"candidates": InBatch(1), **settings},
        )

    return make


def batches(number):
    g = torch.Generator().manual_seed(number)
    return AGSMBatch(
        torch.randn(3, 4, 8, 8, generator=g),
        torch.randint(1000, (3,), generator=g),
        torch.randn(3, 4, 8, 8, generator=g),
        {"prompt_embeds": torch.randn(3, 8, 16, generator=g)},
        ["a", "b", "c"],
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.sd_pipeline.unet.named_parameters()}


@pytest.mark.parametrize("lora", [True, False])
def test_without_weight_it_is_trls_trainer_bit_for_bit(lora, folder, tmp_path):
    plain = DDPOTrainer(config(tmp_path), bright, asked, pipeline(folder, lora))
    started = weights(plain)
    plain.train()
    ours = AGSMDDPOTrainer(
        config(tmp_path), bright, asked, pipeline(folder, lora), agsm=regularizer(0.0),
        batches=lambda number: pytest.fail("nothing is drawn for a weight of 0"),
    )  # fmt: skip
    ours.train()
    made, expected = weights(ours), weights(plain)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert any(not torch.equal(started[name], expected[name]) for name in made)
    assert ours.agsm.ema.num_updates == 2 and ours.agsm.step == 2


def test_the_term_is_in_the_loss_and_grows_with_lambda(folder, tmp_path):
    def gradient(weight):
        pipe = pipeline(folder)
        tokens = soft_tokens(pipe)
        trainer = AGSMDDPOTrainer(
            config(tmp_path), bright, asked, pipe, agsm=regularizer(weight), batches=batches,
            attached=tokens,
        )  # fmt: skip
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        g = torch.Generator().manual_seed(5)
        x, after = torch.randn(2, 2, 4, 8, 8, generator=g)
        loss, _, _ = trainer.calculate_loss(
            x, torch.tensor([667, 334]), after, torch.zeros(2), torch.ones(2),
            torch.randn(4, 8, 16, generator=g),
        )  # fmt: skip
        loss.backward()
        return torch.cat([p.grad.flatten() for p in trainer.trainable_layers])

    host, one, two = (gradient(weight) for weight in (0.0, 1.0, 2.0))
    assert (one - host).norm() > 0.1 * host.norm() > 0
    torch.testing.assert_close(two - host, 2 * (one - host), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_accumulate_over_timesteps_and_samples_as_a_mean(every, folder, tmp_path):
    """Equal rewards leave DDPO without a gradient: what the optimizer sees is AGSM's mean."""

    def equal(images, prompts, metadata):
        return torch.ones(len(images)), {}

    pipe = pipeline(folder)
    attached = soft_tokens(pipe)
    trainer = AGSMDDPOTrainer(
        config(tmp_path, num_epochs=1, train_max_grad_norm=1e9), equal, asked, pipe,
        agsm=regularizer(0.7), batches=batches, attached=attached, every=every,
    )  # fmt: skip
    expected = 0.0
    for number in range(0, ACCUMULATED, every):
        term = agsm_on(batches(number), trainer.agsm, pipe.scheduler)
        grads = torch.autograd.grad(term.loss, trainer.trainable_layers, allow_unused=True)
        expected += torch.cat([
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(trainer.trainable_layers, grads, strict=True)
        ]) / (ACCUMULATED / every)  # fmt: skip
    trainer.agsm.calls = 0  # so that the run draws the same captions
    seen = []

    def look(*_):
        seen.append(torch.cat([p.grad.flatten() for p in trainer.trainable_layers]))

    trainer.optimizer.optimizer.register_step_pre_hook(look)
    trainer.train()
    assert len(seen) == 1 and expected.norm() > 1e-3
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-6)
    assert trainer.agsm.ema.num_updates == 1


@pytest.fixture
def fresh():
    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("lora", [True, False])
def test_in_half_precision_the_ratio_is_one_before_the_first_update(lora, folder, tmp_path):
    """Sampled 4 at a time, trained 2 at a time; VAE and rewards are not in bfloat16."""
    seen, told, pipe = [], [], pipeline(folder, lora)

    class Watching(AGSMDDPOTrainer):
        def calculate_loss(self, *args):
            found = super().calculate_loss(*args)
            seen.append((self.agsm.step, *(one.item() for one in found[1:])))
            return found

    def watched(images, prompts, metadata):
        told.append((images.dtype, len(images)))
        return bright(images, prompts, metadata)

    before = pipe.vae.decoder.conv_in.weight.clone()
    trainer = Watching(
        config(tmp_path, mixed_precision="bf16", train_clip_range=1e-9, num_epochs=1,
               sample_num_batches_per_epoch=2), watched, asked, pipe, agsm=regularizer(0.0),
        batches=batches,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2 * ACCUMULATED and seen[0][0] == 0
    assert all((kl, clipped) == (0, 0) for step, kl, clipped in seen if step == 0)
    assert any(kl > 0 for step, kl, _ in seen if step == 1)
    assert told == [(torch.float32, 2)] * 4
    assert torch.equal(pipe.vae.decoder.conv_in.weight, before)


def test_equal_rewards_have_no_advantage(folder, tmp_path):
    """Of 3: in float32 their mean and deviation are rounding errors. Adam makes any gradient 1."""

    def equal(images, prompts, metadata):
        return torch.full((len(images),), 100.1), {}

    for tracking in (False, True):
        pipe = pipeline(folder)
        trainer = AGSMDDPOTrainer(
            config(tmp_path, num_epochs=1, sample_num_batches_per_epoch=3, train_batch_size=1,
                   train_gradient_accumulation_steps=12, per_prompt_stat_tracking=tracking),
            equal, asked, pipe,
        )  # fmt: skip
        seen = []
        trainer.optimizer.optimizer.register_step_pre_hook(
            lambda *_, trainer=trainer, seen=seen: seen.extend(
                one.grad.abs().max().item() for one in trainer.trainable_layers
            )
        )
        trainer.train()
        assert trainer.equal and seen and not any(seen)


def test_a_reward_counts_beside_others_of_its_prompt():
    tracker = trl_ddpo._PerPrompt(8, 2)
    first = tracker.update(["a", "a", "b"], np.float32([0.1, 0.1, 0.7]))
    assert first[:2].tolist() == [0, 0] and first[2] > 0  # b has but one: the batch is compared
    assert tracker.update(["a"], np.float32([0.3]))[0] > 0


def test_its_own_samples_are_those_with_the_best_rewards(folder, tmp_path, monkeypatch):
    def cats(images, prompts, metadata):
        return torch.tensor([float(prompt in PROMPTS[2:]) for prompt in prompts]), {}

    order = iter(PROMPTS * 2)
    seen = []

    def record(batch, agsm, scheduler):
        seen.append(batch)
        return agsm_on(batch, agsm, scheduler)

    monkeypatch.setattr(trl_ddpo, "agsm_on", record)
    pipe = pipeline(folder)
    trainer = AGSMDDPOTrainer(
        config(tmp_path, num_epochs=1, sample_num_batches_per_epoch=2), cats,
        lambda: (next(order), {}), pipe, agsm=regularizer(), best=0.5, batch_size=4,
    )  # fmt: skip
    samples = []
    generate = DDPOTrainer._generate_samples
    monkeypatch.setattr(
        DDPOTrainer,
        "_generate_samples",
        lambda *a, **k: samples.append(generate(*a, **k)) or samples[-1],
    )
    trainer.step(0, 0)
    assert len(seen) == 2 * ACCUMULATED
    ids = caption_ids(pipe.sd_pipeline, PROMPTS[2:] * 2)
    assert all(sorted(one.captions) == sorted(ids) for one in seen)
    last = torch.cat([one["next_latents"][:, -1] for one in samples[0][0]])
    rows = [i for i, prompt in enumerate(PROMPTS * 2) if prompt in PROMPTS[2:]]
    wanted = {last[i].sum().item() for i in rows}
    assert {latent.sum().item() for latent in seen[0].latents} == wanted
    assert not torch.equal(seen[0].noise, seen[1].noise)


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(folder, tmp_path):
    def run(place, epochs, **changed):
        pipe, numbers = pipeline(folder), []

        def noted(number):
            numbers.append(number)
            return batches(number)

        trainer = AGSMDDPOTrainer(
            config(place, num_epochs=epochs, save_freq=1, per_prompt_stat_tracking=True,
                   per_prompt_stat_tracking_min_count=2, **changed),
            bright, asked, pipe, agsm=regularizer(0.5, candidates=InBatch(1, allow_empty=True)),
            attached=soft_tokens(pipe), batch_size=4, batches=noted,
        )  # fmt: skip
        trainer.train()
        return trainer, numbers

    whole, asked_of_whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    resumed, asked_of_resumed = run(
        tmp_path / "cut", 3, resume_from=str(tmp_path / "cut" / "checkpoints")
    )
    assert resumed.first_epoch == 2
    for one, other in zip(whole.trainable_layers, resumed.trainable_layers, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.agsm.ema.shadow, resumed.agsm.ema.shadow, strict=True):
        assert torch.equal(one, other)
    assert resumed.global_step == whole.global_step == 3 and resumed.agsm.step == 3
    assert asked_of_whole == list(range(3 * ACCUMULATED))
    assert asked_of_resumed == asked_of_whole[2 * ACCUMULATED :]


def test_a_missing_or_newer_trl_is_named_with_the_extra(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for found in (lambda name: "0.24.1", lambda name: "0.19.0", absent):
        monkeypatch.setattr(importlib.metadata, "version", found)
        with pytest.raises(ImportError, match=r"pip install \"\.\[trl\]\""):
            runpy.run_path(trl_ddpo.__file__)  # imported once more


def test_arguments_that_cannot_work_are_refused(folder, tmp_path):
    def make(pipe=None, **given):
        changed = given.pop("changed", {})
        pipe = pipeline(folder) if pipe is None else pipe
        return AGSMDDPOTrainer(config(tmp_path, **changed), bright, asked, pipe, **given)

    for given in ({"best": 0.0}, {"batch_size": 1}, {"every": 0}, {"every": 4}):
        with pytest.raises(ValueError, match=r"every|best in"):
            make(agsm=regularizer(), **given)
    with pytest.raises(ValueError, match=r"train_timestep_fraction: .* 3 sampling.*Take 0\.333"):
        make(changed={"train_timestep_fraction": 0.3})
    with pytest.raises(ValueError, match="sample_eta"):
        make(changed={"sample_eta": 0.0})
    pipe = pipeline(folder)
    pipe.sd_pipeline.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(ValueError, match="steps_offset"):
        make(pipe)


@pytest.mark.slow
def test_processes_train_one_model(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    ranks = run_ranks(workers.ddpo, 2, folder)
    for part in range(3):
        for one, other in zip(ranks[0][part], ranks[1][part], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(ranks[0][0], ranks[0][1], strict=True))
    # AGSM trains on the best of both, which the second process has.
    best = ranks[1][3]
    for *_, shown, prompts in ranks.values():
        assert shown and all(
            any(torch.equal(latents, one) for one in best) for batch in shown for latents in batch
        )
        assert prompts == ["a dog of 1", "a cow of 1", "a cow of 1"]


def test_own_samples_are_noised_by_seed_rank_and_micro_step():
    def drawn(seed, rank, number):
        own = BestSamples(1.0, 4, seed, rank)
        own.latents, own.embeds = torch.zeros(4, 1, 2, 2), torch.zeros(4, 1)
        own.prompts = ["a", "b", "c", "d"]
        own.choose(torch.zeros(4))
        return own.batch(number).noise

    first = drawn(0, 0, 0)
    assert torch.equal(first, drawn(0, 0, 0))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, drawn(*other))


@pytest.mark.parametrize("clip", [1.0, float("inf")])
def test_a_gradient_that_is_not_finite_reaches_no_weight(clip, folder, tmp_path):
    def damaged(number):
        batch = batches(number)
        if number == ACCUMULATED + 1:
            batch.latents[0, 0, 0, 0] = float("nan")
        return batch

    trainer = AGSMDDPOTrainer(
        config(tmp_path, train_max_grad_norm=clip), bright, asked, pipeline(folder),
        agsm=regularizer(), batches=damaged,
    )  # fmt: skip
    step = trainer.step(0, 0)
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"step 1 of epoch 1, .* '(a|two)"):
        trainer.step(1, step)
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
