"""AGSM in the trainers that people use, on stand-ins; test_trainers_themselves.py runs them."""

import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from agsm_loss import AGSMLoss
from agsm_loss.integrations.trainers import ai_toolkit, sd_scripts
from agsm_loss.integrations.trainers.diffsynth_studio import train_guidance


def both(loss, weights):
    return loss.detach(), torch.autograd.grad(loss, weights)


# DiffSynth-Studio


class Pipe:
    """As DiffSynth-Studio's: predicts from keywords, of one image."""

    def __init__(self, outputs=1):
        torch.manual_seed(0)
        self.layer, self.outputs, self.calls = nn.Linear(7, 4, dtype=torch.float64), outputs, []

    def model_fn(self, latents, text, timestep, **others):
        self.calls.append((torch.is_grad_enabled(), sorted(others)))
        pred = self.layer(torch.cat([latents, text], dim=1)).tanh()
        return pred if self.outputs == 1 else (pred, pred * timestep)


def sft(pipe, inputs_shared, inputs_posi, inputs_nega):
    """As DiffSynth-Studio's losses: a noised image, the prediction, a weighted squared error."""
    noise = torch.randn(1, 4, dtype=torch.float64)
    timestep = torch.rand(1, dtype=torch.float64)
    preds = pipe.model_fn(**inputs_shared, **inputs_posi, latents=noise, timestep=timestep)
    preds = preds if isinstance(preds, tuple) else (preds,)
    return 0.3 * sum((pred - noise - 1).square().mean() for pred in preds)


def studio():
    def inputs(data):
        return {"cfg_scale": 1}, {"prompt": data}, {}

    losses = {"sft": sft, "sft:train": sft, "sft:data_process": None, "direct_distill": None}
    return SimpleNamespace(task_to_loss=losses, get_pipeline_inputs=inputs)


def encoded(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, dtype=torch.float64, generator=generator)]


def studio_inputs():
    posi = {"prompt": "a cat", "text": encoded(1)[0], "mask": 1}
    return {"height": 8}, posi, {"negative_prompt": "", "text": encoded(2)[0]}


@pytest.mark.parametrize("outputs", [1, 2])
def test_in_diffsynth_studio_the_loss_is_guidance_free_trainings(outputs):
    """Its PR 1650: the same value, 1/s of the gradient; video and audio."""
    module, pipe = studio(), Pipe(outputs)
    train_guidance(module, guidance_scale=3)
    torch.manual_seed(1)
    value, grads = both(module.task_to_loss["sft"](pipe, *studio_inputs()), pipe.layer.weight)
    own, null = pipe.calls
    assert own == (True, ["height", "mask", "prompt"])
    assert null == (False, ["height", "negative_prompt"])  # as in a sampler

    class Free(Pipe):
        def model_fn(self, text, **inputs):
            with torch.no_grad():
                null = super().model_fn(text=encoded(2)[0], **inputs)
            pred = super().model_fn(text=text, **inputs)
            if self.outputs == 1:
                return (pred + 2 * null) / 3
            return tuple((a + 2 * b) / 3 for a, b in zip(pred, null, strict=True))

    free = Free(outputs)
    torch.manual_seed(1)
    value_free, grads_free = both(sft(free, *studio_inputs()), free.layer.weight)
    torch.testing.assert_close(value, value_free)
    torch.testing.assert_close(grads[0], 3 * grads_free[0])
    assert pipe.model_fn.__func__ is Pipe.model_fn


def test_in_diffsynth_studio_the_networks_are_the_samplers():
    """Ideogram 4: two, of which the second predicts under the negative prompt."""

    def model_fn(dit, text, **_):
        return dit * text

    def loss(pipe, shared, posi, nega):
        return pipe.model_fn(**shared, **posi, dit=pipe.dit, dit_uncond=pipe.dit_uncond)

    module = studio()
    module.task_to_loss["sft"] = loss
    train_guidance(module, guidance_scale=2)
    for second, expected in ((torch.tensor(4.0), (2 * 3 + 4 * 1) / 2), (None, (2 * 3 + 2 * 1) / 2)):
        pipe = SimpleNamespace(dit=torch.tensor(2.0), dit_uncond=second, model_fn=model_fn)
        texts = ({"text": torch.tensor(one)} for one in (3.0, 1.0))
        assert module.task_to_loss["sft"](pipe, {}, *texts) == expected


def test_in_diffsynth_studio_a_scale_of_1_changes_nothing():
    module, pipe = studio(), Pipe()
    train_guidance(module, guidance_scale=1)
    assert module.get_pipeline_inputs("a cat") == ({"cfg_scale": 1}, {"prompt": "a cat"}, {})
    torch.manual_seed(1)
    loss = module.task_to_loss["sft:train"](pipe, *studio_inputs())
    torch.manual_seed(1)
    assert torch.equal(loss, sft(pipe, *studio_inputs())) and len(pipe.calls) == 2


def test_in_diffsynth_studio_a_negative_prompt_that_is_not_encoded_is_named():
    module, pipe = studio(), Pipe()
    train_guidance(module, guidance_scale=3)
    loss = module.task_to_loss["sft"]
    shared, posi, nega = studio_inputs()
    given = module.get_pipeline_inputs("a cat")[2]
    assert given["prompt"] == given["negative_prompt"] == ""  # SDXL's name, the others'
    with pytest.raises(ValueError, match=r"inputs_nega: .* got no \['text'\]"):
        loss(pipe, shared, posi, {"negative_prompt": ""})
    with pytest.warns(UserWarning, match="sft:data_process again"):
        loss(pipe, shared, posi, {**nega, "text": posi["text"].clone()})
    with pytest.raises(ValueError, match="task_to_loss has sft, got a SimpleNamespace"):
        train_guidance(SimpleNamespace(), guidance_scale=3)
    with pytest.raises(ValueError, match="guidance_scale: expected"):
        train_guidance(studio(), guidance_scale=0.5)


# ai-toolkit


class SDTrainer:
    """As ai-toolkit's, of a model with one layer: its own guidance loss is form A."""

    def __init__(self, config, scale=3.0, unconditional_path=None, **train):
        torch.manual_seed(0)
        self.config, self.scale, self.calls = config, scale, []
        self.dataset_configs = [SimpleNamespace(unconditional_path=unconditional_path)]
        given = {"do_guidance_loss": False, "loss_type": "mse", "train_text_encoder": False}
        self.train_config = SimpleNamespace(**given | {"unconditional_prompt": ""} | train)
        self.layer = nn.Linear(7, 4, dtype=torch.float64)
        self.unconditional_embeds, self.do_long_prompts = encoded(2)[0], True

    def encode_static_prompt(self, prompt, long_prompts):
        assert (prompt, long_prompts, torch.is_grad_enabled()) == ([""], True, False)
        return encoded(6)[0]

    def get_conf(self, key, default=None):
        return self.config.get(key, default)

    def predict_noise(
        self,
        noisy_latents,
        timesteps=1,
        conditional_embeds=None,
        unconditional_embeds=None,
        batch=None,
        is_primary_pred=False,
        **kwargs,
    ):
        self.calls.append((torch.is_grad_enabled(), is_primary_pred, kwargs))
        pred = self.layer(torch.cat([noisy_latents, conditional_embeds], dim=1)).tanh()
        if batch.audio_target is not None:
            setattr(batch, batch.audio_pred_slot or "audio_pred", pred[:, :2] * timesteps)
        return pred

    def calculate_loss(self, noise_pred, noise, noisy_latents, batch, mask=1, prior_pred=None):
        target, audio_target = noise - 1, batch.audio_target
        if self.train_config.do_guidance_loss:
            with torch.no_grad():
                null = self.unconditional_embeds.expand(len(noise), -1)
                batch.audio_pred_slot = "audio_pred_uncond"
                u = self.predict_noise(noisy_latents, 0.5, null, batch=batch)
                batch.audio_pred_slot = None
                target = u + self.scale * (target - u)
                if audio_target is not None:
                    u = batch.audio_pred_uncond
                    audio_target = u + self.scale * (audio_target - u)
        loss = (mask * torch.arange(1, 5) * (noise_pred - target) ** 2).mean()
        if prior_pred is not None:
            loss = loss + ((1 - mask) * (noise_pred - prior_pred) ** 2).mean()
        if audio_target is not None:
            loss = loss + 0.5 * (batch.audio_pred - audio_target).square().mean()
        return loss

    def loss(self, audio=False, **preserved):
        torch.manual_seed(1)
        noise, text = (torch.randn(3, n, dtype=torch.float64) for n in (4, 3))
        batch = SimpleNamespace(audio_target=None, audio_pred=None, audio_pred_slot=None)
        batch.audio_target = noise[:, :2] + 1 if audio else None
        given = {"timesteps": 0.5, "conditional_embeds": text, "batch": batch, "extra": 1}
        pred = self.predict_noise(noisy_latents=noise, **given, is_primary_pred=True)
        return self.calculate_loss(pred, noise, noise, batch, **preserved)


class OurTrainer(ai_toolkit.AGSMTrainer, SDTrainer):
    concat_prompt_embeds = staticmethod(torch.cat)


@pytest.mark.parametrize("audio", [False, True])
def test_in_ai_toolkit_the_loss_is_its_guidance_loss(audio):
    """do_guidance_loss: s² times the value, s times the gradient; under its weighting."""
    ours = OurTrainer({"agsm_guidance_scale": 3})
    theirs = SDTrainer({}, do_guidance_loss=True)
    value, grads = both(ours.loss(audio), ours.layer.weight)
    value_a, grads_a = both(theirs.loss(audio), theirs.layer.weight)
    torch.testing.assert_close(9 * value, value_a)
    torch.testing.assert_close(3 * grads[0], grads_a[0])
    assert ours.calls == [(True, True, {"extra": 1}), (False, False, {"extra": 1})]


def test_in_ai_toolkit_what_is_to_be_preserved_is():
    """inverted_mask_prior, prior_reg: there the target is the model's own prediction."""
    mask, prior = torch.tensor([[1.0], [0.25], [0.0]]), torch.ones(3, 4, dtype=torch.float64)
    losses = []
    for kind in (OurTrainer, SDTrainer):
        for given in ({"mask": mask}, {"mask": mask, "prior_pred": prior}):
            trainer = kind({})
            losses.append(both(trainer.loss(**given), trainer.layer.weight))
    (ours, ours_prior, theirs, theirs_prior) = ((one, grad) for one, (grad,) in losses)
    for a, b, c, d in zip(ours, ours_prior, theirs, theirs_prior, strict=True):
        torch.testing.assert_close(b - a, d - c)
        assert not torch.equal(a, c)


def test_in_ai_toolkit_a_trained_text_encoder_encodes_the_empty_prompt_anew():
    ours, frozen = (OurTrainer({}, train_text_encoder=trained) for trained in (True, False))
    frozen.unconditional_embeds = encoded(6)[0]
    assert torch.equal(ours.loss(), frozen.loss())


def test_in_ai_toolkit_a_scale_of_1_is_the_trainer_itself():
    ours, theirs = OurTrainer({"agsm_guidance_scale": 1}), SDTrainer({})
    assert torch.equal(ours.loss(), theirs.loss()) and len(ours.calls) == 1
    assert OurTrainer({}).agsm_guidance_scale == 3


def test_in_ai_toolkit_two_guidance_losses_or_no_ai_toolkit_are_named(monkeypatch):
    with pytest.raises(ValueError, match="do_guidance_loss: expected false"):
        OurTrainer({}, do_guidance_loss=True)
    for other in ({"loss_type": "mean_flow"}, {"unconditional_path": "pairs"}):
        with pytest.raises(ValueError, match="a job without it, got agsm_guidance_scale 3"):
            OurTrainer({}, **other)
        OurTrainer({"agsm_guidance_scale": 1}, **other)
    with pytest.raises(ValueError, match="guidance_scale: expected"):
        OurTrainer({"agsm_guidance_scale": 0.5})
    (extension,) = ai_toolkit.AI_TOOLKIT_EXTENSIONS
    assert extension.uid == "agsm_trainer"
    monkeypatch.setitem(sys.modules, "extensions_built_in", None)
    with pytest.raises(ImportError, match=r"at commit 27a03a9, got: .*ostris/ai-toolkit"):
        extension.get_process()


# sd-scripts


class NetworkTrainer:
    """As sd-scripts', of a model with one layer."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer, self.calls = nn.Linear(7, 4, dtype=torch.float64), []
        self.table = torch.randn(9, 3, dtype=torch.float64)

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        return text_encoders

    def cache_text_encoder_outputs_if_needed(self, args, accelerator, text_encoders, dataset):
        if args.cache:
            dataset.new_cache_text_encoder_outputs(text_encoders, accelerator)

    def get_noise_pred_and_target(
        self, args, accelerator, latents, batch, text_encoder_conds, unet, is_train=True
    ):
        noise = torch.randn_like(latents) * (1 + random.random() + args.drift * len(self.calls))
        timesteps = torch.randint(0, 1000, (len(latents),))
        with torch.set_grad_enabled(is_train):
            inputs = torch.cat([latents + noise, text_encoder_conds[0]], dim=1)
            pred = self.layer(inputs).tanh()
        self.calls.append((torch.is_grad_enabled() and is_train, text_encoder_conds))
        target = noise.clone()
        for row, one in enumerate(batch.get("custom_attributes", [])):
            if one.get("diff_output_preservation"):
                target[row] = 0.1
        return pred, target, timesteps, 0.5

    def process_batch(
        self,
        batch,
        text_encoders,
        unet,
        accelerator,
        args,
        is_train=True,
        train_text_encoder=True,
    ):
        latents = batch["latents"]
        conds = [text_encoders[0](batch["ids"]), batch.get("cached")]
        pred, target, _, weighting = self.get_noise_pred_and_target(
            args, accelerator, latents, batch, conds, unet, is_train=is_train
        )
        return (weighting * (pred - target) ** 2).mean()


class Agsm3(sd_scripts.AGSMNetworkTrainer, NetworkTrainer):
    guidance_scale = 3


class Agsm1(Agsm3):
    guidance_scale = 1


class Strategy:
    """As sd-scripts' strategies: token 0 is the empty caption."""

    get_strategy = classmethod(lambda cls: cls())

    def tokenize(self, text):
        assert text == ""
        return [torch.tensor([0]), None]

    def encode_tokens(self, tokenize, models, tokens):
        return [models[0](tokens[0]), None]


class Options(Strategy):
    """With what SD3's and Lumina's take: token 0 is the negative prompt; T5 is cached."""

    def tokenize(self, text, is_negative=False):
        return [torch.tensor([0 if is_negative else 7]), None]

    def encode_tokens(
        self,
        tokenize,
        models,
        tokens,
        apply_lg_attn_mask=False,
        apply_t5_attn_mask=False,
        enable_dropout=True,
    ):
        masked = apply_lg_attn_mask is apply_t5_attn_mask is None  # as the strategy's own
        clip = models[0](tokens[0]) * (not enable_dropout) * (1 + masked)
        return [clip, models[1](tokens[0]) if len(models) > 1 else None]


@pytest.fixture
def scripts(monkeypatch):
    base = SimpleNamespace(TokenizeStrategy=Strategy, TextEncodingStrategy=Strategy)
    monkeypatch.setitem(sys.modules, "library", SimpleNamespace(strategy_base=base))
    monkeypatch.setitem(sys.modules, "library.strategy_base", base)
    torch.manual_seed(2)
    return [nn.Embedding(9, 3, dtype=torch.float64)]


def scripts_loss(trainer, text_encoders, cache=False, drift=0, given=None, **batch):
    accelerator = SimpleNamespace(autocast=nullcontext)
    args = SimpleNamespace(cache=cache, drift=drift)
    dataset = SimpleNamespace(new_cache_text_encoder_outputs=lambda *_: None)
    trainer.cache_text_encoder_outputs_if_needed(args, accelerator, text_encoders, dataset)
    batch |= {"latents": torch.ones(3, 4, dtype=torch.float64), "ids": torch.tensor([3, 0, 5])}
    torch.manual_seed(4)
    random.seed(4)
    given = {"accelerator": accelerator, "args": args} | (given or {})
    loss = trainer.process_batch(batch, text_encoders, None, **given)
    return loss, torch.randn(1), random.random()


@pytest.mark.unchecked_shapes  # they draw from random
@pytest.mark.parametrize("cache", [False, True])
def test_in_sd_scripts_the_loss_is_agsms_at_the_hosts_noise(cache, scripts):
    host, ours = NetworkTrainer(), Agsm3()
    host_loss, *after = scripts_loss(host, scripts)
    loss, *after_ours = scripts_loss(ours, scripts, cache)
    assert after_ours == after  # later draws are the host's
    (null, own), ((_, conds),) = ours.calls, host.calls
    assert not null[0] and own[0] and torch.equal(own[1][0], conds[0]) and null[1][1] is None
    assert torch.equal(null[1][0], scripts[0](torch.zeros(3, dtype=torch.long)))
    torch.manual_seed(4)
    random.seed(4)
    noise = torch.randn(3, 4, dtype=torch.float64) * (1 + random.random())
    pred, null_pred = (
        ours.layer(torch.cat([1 + noise, one[1][0]], dim=1)).tanh() for one in (own, null)
    )
    pred = torch.stack([pred, null_pred], dim=1)
    expected = 0.5 * AGSMLoss(guidance_scale=3)(pred, pred.detach(), noise)
    got, expected = (both(one, ours.layer.weight) for one in (loss, expected))
    torch.testing.assert_close(got, expected)
    one = Agsm1()
    assert torch.equal(scripts_loss(one, scripts, cache)[0], host_loss) and len(one.calls) == 1


def test_in_sd_scripts_the_empty_caption_is_encoded_as_captions_are(scripts, monkeypatch):
    """With the masks of cached captions, never dropped, as a negative prompt, and as trained."""
    base = sys.modules["library.strategy_base"]
    monkeypatch.setattr(base, "TokenizeStrategy", Options)
    monkeypatch.setattr(base, "TextEncodingStrategy", Options)
    encoders = [*scripts, nn.Embedding(9, 3, dtype=torch.float64)]
    (clip,), (t5,) = (one(torch.tensor([0])).detach() for one in encoders)

    def null(trainer, encoders, cache=False, **given):
        trainer.calls.clear()
        scripts_loss(trainer, encoders, cache, given=given, cached=torch.ones(3, 3).double())
        return [one[0].detach() for one in trainer.calls[0][1]]

    torch.testing.assert_close(null(Agsm3(), encoders), [clip, t5])
    trainer = Agsm3()
    cached = null(trainer, encoders, cache=True, train_text_encoder=False)
    torch.testing.assert_close(cached, [2 * clip, t5])
    with torch.no_grad():
        for one in encoders:
            one.weight.mul_(5)
    torch.testing.assert_close(null(trainer, scripts), [5 * clip, t5])


def test_in_sd_scripts_preserved_rows_keep_their_prediction(scripts):
    kept = [{"diff_output_preservation": True}, {}, {}]
    rows = []
    for kind in (Agsm3, Agsm1):
        trainer = kind()
        get = trainer.get_noise_pred_and_target
        trainer.get_noise_pred_and_target = lambda *a, get=get, **k: (
            rows.append(get(*a, **k)) or rows[-1]
        )
        scripts_loss(trainer, scripts, custom_attributes=kept)
    (moved, target, *_), (pred, plain_target, *_) = rows
    assert torch.equal(target, plain_target) and (target[0] == 0.1).all()
    assert torch.equal(moved[0], pred[0]) and not torch.equal(moved[2], pred[2])
    torch.testing.assert_close(moved[1], pred[1])  # an empty caption


def test_in_sd_scripts_other_noise_in_the_second_pass_is_named(scripts):
    with pytest.raises(RuntimeError, match="got other noise in the second pass"):
        scripts_loss(Agsm3(), scripts, drift=1)
