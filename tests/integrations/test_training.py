"""Denoiser callables, targets and A(t), by the scheduler's config."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from integrations_tiny import NAMES, TEXT, tiny
from peft import LoraConfig

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank
from agsm_loss import functional as AF
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser, compute_dtype
from agsm_loss.integrations.noise import (
    add_noise,
    noise_levels,
    prediction_type,
    regression_target,
    reward_weight,
)
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def scheduler_of(kind):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")


def denoiser_of(name, **settings):
    made = tiny(name)
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0, **settings).double()
    return made, TokenDenoiser(attach_soft_tokens(made.model, tokens))


def batch_for(name, batch=3):
    """(noisy, timesteps, conditioning, image conditioning), with the pipelines' names."""
    size = 4 if name == "sana" else 8
    channels = {"flux": 1, "qwen": 4}.get(name, 4)
    noisy = torch.randn(batch, channels, size, size).double()
    cond = {"prompt_embeds": torch.randn(batch, TEXT, 16).double()}
    image = {}
    if name in ("unet_sdxl", "sd3", "sd3.5", "flux"):
        cond["pooled_prompt_embeds"] = torch.randn(batch, 12).double()
    if name == "unet_sdxl":
        image["add_time_ids"] = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * batch).double()
    if name == "flux":
        image["guidance"] = torch.full((batch,), 3.5).double()
    if name == "qwen":
        cond["prompt_embeds_mask"] = torch.tensor([[1] * TEXT, [1] * 4 + [0] * 2, [1] * TEXT])
    if name == "sana":
        cond["prompt_attention_mask"] = torch.tensor(
            [[1.0] * TEXT, [1.0] * 4 + [0] * 2, [1.0] * TEXT]
        )
    return noisy, torch.tensor([37.0, 410.0, 905.0]).double(), cond, image


@pytest.mark.parametrize("name", NAMES)
def test_the_regularizer_trains_tokens_on_every_backbone(name):
    _, denoiser = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    ema = EMA(denoiser.parameters())
    assert {id(p) for p in ema.parameters} == {id(p) for p in denoiser.tokens.parameters()}
    agsm = AGSMRegularizer(denoiser, ema, num_negatives=2)
    out = agsm(noisy, t, torch.randn_like(noisy), cond, captions=["a", "b", "c"],
               image_conditioning=image)  # fmt: skip
    out.loss.backward()
    grad = denoiser.tokens.tokens.grad
    assert out.loss.isfinite() and grad[0].abs().max() > 0 and grad[1].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_denoiser_is_the_model_without_tokens(name):
    made, wearing = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    off = wearing(noisy, t, cond, torch.full((3,), int(Bank.OFF)), **image)
    plain = PlainDenoiser(made.model)
    wearing.attached.detach()
    assert torch.equal(plain(noisy, t, cond, Bank.POSITIVE, **image), off)
    assert torch.equal(plain(noisy, t, cond, torch.tensor([0, 1, 1]), **image), off)
    assert not any(key.startswith("_backbone") for key in plain.state_dict())


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", NAMES)
def test_conditioning_that_is_missing_or_would_not_be_read_is_refused(name):
    made, denoiser = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    plain = PlainDenoiser(made.model)
    for call in (denoiser, plain):
        with pytest.raises(TypeError, match=r"conditioning: expected a dict .*, got Tensor"):
            call(noisy, t, cond["prompt_embeds"], Bank.POSITIVE, **image)
        with pytest.raises(ValueError, match=r"^conditioning: .*got .*'encoder_attention_mask'"):
            call(noisy, t, cond | {"encoder_attention_mask": noisy}, Bank.POSITIVE, **image)
        with pytest.raises(ValueError, match=r"^image_conditioning: .*got .*'controlnet_cond'"):
            call(noisy, t, cond, Bank.POSITIVE, **image, controlnet_cond=noisy)
        for missing in [key for key in cond if "mask" not in key]:
            rest = {key: value for key, value in cond.items() if key != missing}
            with pytest.raises(ValueError, match=f"^conditioning: expected .*'{missing}'"):
                call(noisy, t, rest, Bank.POSITIVE, **image)
        for missing in image:
            with pytest.raises(ValueError, match=f"^image_conditioning: expected .*'{missing}'"):
                call(noisy, t, cond, Bank.POSITIVE)


def test_inputs_come_in_what_the_model_computes_in():
    made = tiny("unet")
    assert compute_dtype(made.model) == torch.float64
    model = made.model.to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert compute_dtype(model) == torch.bfloat16
    noisy, t, cond, _ = batch_for("unet")
    assert PlainDenoiser(model)(noisy, t, cond, Bank.POSITIVE).dtype == torch.bfloat16
    quantized = torch.nn.Module()
    quantized.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    quantized.norm = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    assert compute_dtype(quantized) == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_in_half_precision_are_those_of_float32(kind):
    """SD's σ at t = 0 is 0.03; √(1 − ᾱ) in bfloat16 is 0."""
    scheduler, t = scheduler_of(kind), torch.tensor([0, 1, 2, 999])
    half = torch.randn(4, 2, 3, 3).bfloat16()
    for ours, exact in zip(
        noise_levels(scheduler, t, half), noise_levels(scheduler, t, half.double()), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    noise = torch.randn_like(half)
    for function in (add_noise, regression_target):
        exact = function(scheduler, half.double(), noise.double(), t)
        assert torch.equal(function(scheduler, half, noise, t), exact.bfloat16())


class Wrapped(torch.nn.parallel.DistributedDataParallel):
    """As DDP holds a model, without processes: nothing but `module` and the call is passed on."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module

    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_calls_the_model_as_the_host_has_wrapped_it(name):
    made, bare = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    wrapped = Wrapped(made.model)
    bank = torch.tensor([0, 1, 0])
    worn = TokenDenoiser(bare.attached, wrapped)(noisy, t, cond, bank, **image)
    assert torch.equal(worn, bare(noisy, t, cond, bank, **image))
    off = bare(noisy, t, cond, Bank.OFF, **image)
    with bare.attached.using(Bank.OFF):
        assert torch.equal(PlainDenoiser(wrapped)(noisy, t, cond, bank, **image), off)
    assert wrapped.calls == 2 and not torch.equal(worn, off)
    with pytest.raises(ValueError, match="expected the attached denoiser"):
        TokenDenoiser(bare.attached, torch.nn.Linear(1, 1))


def test_flux_and_qwen_latents_are_packed_as_their_pipelines_do():
    from diffusers import FluxPipeline, QwenImagePipeline

    from agsm_loss.integrations.tokens.hooks import patches, unpatched

    latents = torch.randn(2, 4, 6, 8)
    for pipeline in (FluxPipeline, QwenImagePipeline):
        assert torch.equal(patches(latents), pipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpatched(patches(latents), latents), latents)
    _, denoiser = denoiser_of("flux")
    noisy, t, cond, image = batch_for("flux")
    seen = {}
    denoiser.model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    denoiser(noisy, t, cond, Bank.OFF, **image)
    ids = FluxPipeline._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float64)
    assert torch.equal(seen["img_ids"], ids)
    torch.testing.assert_close(seen["timestep"], t / 1000)


def test_a_bfloat16_backbone_takes_float32_inputs():
    made = tiny("sd3", torch.bfloat16)
    tokens = make_soft_tokens(made.model)
    denoiser = TokenDenoiser(attach_soft_tokens(made.model, tokens))
    noisy, t, cond, _ = batch_for("sd3")
    cond = {n: v.float() for n, v in cond.items()}
    out = denoiser(noisy.float(), t.float(), cond, Bank.POSITIVE)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_target_agree_with_the_library(kind):
    scheduler = scheduler_of(kind)
    x_0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([3, 400, 900])
    assert prediction_type(scheduler) == kind
    noisy, target = (f(scheduler, x_0, noise, t) for f in (add_noise, regression_target))
    if kind == "flow":
        chosen = scheduler.timesteps[[5, 400, 900]]
        expected = scheduler.scale_noise(x_0, chosen, noise)
        torch.testing.assert_close(add_noise(scheduler, x_0, noise, chosen), expected)
        assert torch.equal(target, noise - x_0)
        add_noise(scheduler, x_0, noise, torch.tensor([3.5, 400.2, 900.9]))
        return
    torch.testing.assert_close(noisy, scheduler.add_noise(x_0, noise, t))
    velocity = scheduler.get_velocity(x_0, noise, t)
    expected = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[kind]
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_reward_weight_turns_errors_into_those_of_epsilon(kind):
    """A prediction off by δ in ε, said in each parametrisation at the same x_t."""
    scheduler = scheduler_of(kind)
    x_0, noise = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    t = torch.tensor([50, 400, 900])
    noisy = add_noise(scheduler, x_0, noise, t)
    off = noise.unsqueeze(1) + 0.3 * torch.randn(3, 4, 5).double()
    # The x_0 that explains the same x_t under a wrong ε, then that pair's own target.
    if kind == "flow":
        sigma = (t / 1000).double().reshape(3, 1, 1)
        alpha = 1 - sigma
    else:
        level = scheduler.alphas_cumprod.double()[t].reshape(3, 1, 1)
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
    implied = (noisy.unsqueeze(1) - sigma * off) / alpha
    pred = torch.stack(
        [regression_target(scheduler, implied[:, j], off[:, j], t) for j in range(4)], dim=1
    )
    guided = AGSMLoss(reward_weight=reward_weight(scheduler)).guide(
        pred, regression_target(scheduler, x_0, noise, t), timesteps=t
    )
    torch.testing.assert_close(guided.weights, AF.guide(off, noise).weights, rtol=1e-4, atol=1e-5)


def test_unknown_parametrisations_and_fractional_timesteps_are_refused():
    scheduler = scheduler_of("epsilon")
    with pytest.raises(ValueError, match=r"whole numbers in 0\.\.999"):
        add_noise(scheduler, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.5]))
    scheduler.register_to_config(prediction_type="other")
    with pytest.raises(ValueError, match="got 'other' of DDPMScheduler"):
        prediction_type(scheduler)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_lora_student_has_an_ema_of_its_adapter_and_a_free_reference(name):
    made, denoiser = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    bare = denoiser(noisy, t, cond, Bank.OFF, **image)
    made.model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    made.model.double()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    ema = EMA(denoiser.parameters(), decay=0.0)
    assert len(ema.shadow) == len(trained) > len(list(denoiser.tokens.parameters()))
    agsm = AGSMRegularizer(denoiser, ema, num_negatives=2)
    agsm(noisy, t, noisy, cond, captions=["a", "b", "c"]).loss.backward()
    assert all(p.grad is not None for p in trained)
    assert any(p.grad.abs().max() > 0 for n, p in made.model.named_parameters() if "lora_B" in n)
    made.model.disable_adapters()
    assert torch.equal(denoiser(noisy, t, cond, Bank.OFF, **image), bare)


def test_checkpointed_backbone_in_a_chunked_regularizer():
    """Both replays at once: the regularizer's and the model's."""
    grads = []
    for chunked in (False, True):
        made, denoiser = denoiser_of("sd3")
        if chunked:
            made.model.train().enable_gradient_checkpointing()
        torch.manual_seed(3)
        noisy, t, cond, _ = batch_for("sd3")
        agsm = AGSMRegularizer(
            denoiser,
            EMA(denoiser.parameters()),
            num_negatives=2,
            chunk_size=2 if chunked else None,
            seed=0,
        )
        pred = denoiser(noisy, t, cond, Bank.POSITIVE)
        out = agsm(noisy, t, 0 * noisy, cond, captions=["a", "b", "c"], pred=pred)
        (pred.square().mean() + out.loss).backward()
        grads.append([p.grad for p in denoiser.tokens.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
