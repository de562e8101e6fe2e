"""Denoisers with and without soft tokens, on every backbone."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
)
from integrations_tiny import NAMES, TEXT, run, tiny
from peft import LoraConfig, get_peft_model

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank, InBatch, Passes, SoftTokens
from agsm_loss.integrations.denoisers import (
    CALLABLE,
    PlainDenoiser,
    TokenDenoiser,
    compute_dtype,
)
from agsm_loss.integrations.hosts.rollouts import sample_latents
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens, unwrap
from agsm_loss.integrations.tokens.hooks import patches, unpatched
from agsm_loss.integrations.tokens.saved import SavedTokens
from agsm_loss.integrations.tokens.unet import UNetBackbone, bos_embedding


def denoiser_of(name, **settings):
    made = tiny(name)
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0, **settings).double()
    return made, TokenDenoiser(made.model, tokens=tokens)


def batch_for(name, batch=3):
    """(noisy, timesteps, conditioning, image conditioning), with the pipelines' names."""
    size = 4 if name in ("sana", "flux2", "z_image") else 8
    channels = {"flux": 1, "flux2": 8}.get(name, 4)
    noisy = torch.randn(batch, channels, size, size).double()
    width = 12 if name == "flux2" else 16
    cond = {"prompt_embeds": torch.randn(batch, TEXT, width).double()}
    image = {}
    if name in ("unet_sdxl", "sd3", "sd3.5", "flux"):
        cond["pooled_prompt_embeds"] = torch.randn(batch, 12).double()
    if name == "unet_sdxl":
        image["add_time_ids"] = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * batch).double()
    if name in ("flux", "flux2"):
        image["guidance"] = torch.full((batch,), 3.5).double()
    if name in ("qwen", "z_image"):
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
    agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=1.0), candidates=InBatch(2))
    out = agsm(noisy, t, torch.randn_like(noisy), cond, ["a", "b", "c"],
               image_conditioning=image)  # fmt: skip
    out.loss.backward()
    grad = denoiser.tokens.tokens.grad
    assert out.loss.isfinite() and grad[0].abs().max() > 0 and grad[1].abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_denoiser_is_the_model_without_tokens(name):
    made, denoiser = denoiser_of(name)
    noisy, t, cond, image = batch_for(name)
    off = denoiser(noisy, t, cond, torch.full((3,), int(Bank.OFF)), **image)
    plain = PlainDenoiser(made.model)
    denoiser.detach()
    assert torch.equal(plain(noisy, t, cond, Bank.POSITIVE, **image), off)
    assert torch.equal(plain(noisy, t, cond, torch.tensor([0, 1, 1]), **image), off)
    assert plain.state_dict().keys() == {f"model.{key}" for key in made.model.state_dict()}


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


@pytest.mark.parametrize(
    ("name", "scale"),
    [("unet", {"time_cond_proj_dim": 8}), ("sana", {"guidance_embeds": True})],
)
def test_a_model_that_takes_the_guidance_scale_in_its_own_way_is_refused(name, scale):
    """LCM and Sana-Sprint: without it they predict something else, a UNet without an error."""
    made = tiny(name).model
    model = type(made).from_config({**made.config, **scale, "_use_default_values": []})
    noisy, t, cond, _ = batch_for(name)
    for call in (PlainDenoiser(model), TokenDenoiser(model)):
        with pytest.raises(ValueError, match=f"{next(iter(scale))}=.*a callable of your own"):
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
    ours = TokenDenoiser(wrapped, tokens=bare.attached)(noisy, t, cond, bank, **image)
    assert torch.equal(ours, bare(noisy, t, cond, bank, **image))
    off = bare(noisy, t, cond, Bank.OFF, **image)
    with bare.using(Bank.OFF):
        assert torch.equal(PlainDenoiser(wrapped)(noisy, t, cond, bank, **image), off)
    assert wrapped.calls == 2 and not torch.equal(ours, off)
    with pytest.raises(ValueError, match="expected the attached denoiser"):
        TokenDenoiser(torch.nn.Linear(1, 1), tokens=bare.attached)


PIPELINES = {
    "flux": (FluxPipeline, ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    "qwen": (QwenImagePipeline, ("text_encoder", "tokenizer")),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_are_packed_as_the_stock_pipeline_does(name):
    """From the pipeline's noise the model gets what the pipeline gives it in its first step."""
    model = tiny(name, torch.float32).model
    kind, absent = PIPELINES[name]
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = kind(transformer=model, scheduler=scheduler, vae=None, **dict.fromkeys(absent))
    calls = []
    forward = inspect.signature(type(model).forward)
    model.register_forward_pre_hook(
        lambda m, a, k: calls.append(forward.bind(m, *a, **k).arguments), with_kwargs=True
    )
    text = {"prompt_embeds": torch.randn(1, TEXT, 16)}
    if name == "flux":
        text["pooled_prompt_embeds"] = torch.randn(1, 12)
    else:
        text["prompt_embeds_mask"] = torch.tensor([[1] * 4 + [0] * 2])
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
    pipe(**text, **size, generator=torch.Generator().manual_seed(7))
    channels = model.config.in_channels // 4
    noise = torch.randn(1, channels, 8, 12, generator=torch.Generator().manual_seed(7))
    image = {"guidance": torch.tensor([3.5])} if name == "flux" else {}
    out = PlainDenoiser(model)(noise, torch.tensor([1000.0]), text, Bank.OFF, **image)
    theirs, ours = calls
    assert out.shape == noise.shape
    own = {"flux": ("img_ids", "txt_ids", "guidance"), "qwen": ("img_shapes",)}[name]
    for key in ("hidden_states", "timestep", "encoder_hidden_states", *own):
        torch.testing.assert_close(ours[key], theirs[key])
    assert torch.equal(unpatched(patches(noise), noise), noise)


def test_a_bfloat16_backbone_takes_float32_inputs():
    made = tiny("sd3", torch.bfloat16)
    tokens = make_soft_tokens(made.model)
    denoiser = TokenDenoiser(made.model, tokens=tokens)
    noisy, t, cond, _ = batch_for("sd3")
    cond = {n: v.float() for n, v in cond.items()}
    out = denoiser(noisy.float(), t.float(), cond, Bank.POSITIVE)
    assert out.dtype == torch.bfloat16


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
    agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=1.0), candidates=InBatch(2))
    agsm(noisy, t, noisy, cond, ["a", "b", "c"]).loss.backward()
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
            AGSMLoss(neg_scale=1.0),
            candidates=InBatch(2),
            passes=Passes(chunk_size=2 if chunked else None),
            seed=0,
        )
        pred = denoiser(noisy, t, cond, Bank.POSITIVE)
        out = agsm(noisy, t, 0 * noisy, cond, ["a", "b", "c"], pred=pred)
        (pred.square().mean() + out.loss).backward()
        grads.append([p.grad for p in denoiser.tokens.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def hosts_inputs(name):
    noisy, t, cond, image = batch_for(name)
    return {"noisy": noisy, "timesteps": t, "conditioning": cond, **image}


@pytest.mark.parametrize("name", NAMES)
def test_one_call_makes_and_attaches_and_detach_restores_bit_for_bit(name):
    made, x = tiny(name), tiny(name).inputs()
    bare, state = run(made.model, **x), {n: v.clone() for n, v in made.model.state_dict().items()}
    torch.manual_seed(4)
    denoiser = TokenDenoiser(made.model, num_tokens=2)
    out = run(made.model, **x)
    assert not torch.equal(out, bare)
    with denoiser.using(Bank.OFF):
        assert torch.equal(run(made.model, **x), bare)
    denoiser.detach()
    denoiser.detach()
    assert torch.equal(run(made.model, **x), bare)
    after = made.model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[n], state[n]) for n in state)
    torch.manual_seed(4)
    by_hand = attach_soft_tokens(made.model, make_soft_tokens(made.model, num_tokens=2))
    assert torch.equal(run(made.model, **x), out)
    by_hand.detach()
    with pytest.raises(RuntimeError, match=r"were detached.*tokens=denoiser\.tokens"):
        denoiser(**hosts_inputs(name), bank=Bank.POSITIVE)
    again = TokenDenoiser(made.model, tokens=denoiser.tokens)
    assert torch.equal(run(made.model, **x), out) and again.tokens is denoiser.tokens


@pytest.mark.unchecked_shapes  # the places as an iterator
def test_the_settings_of_new_tokens():
    start = bos_embedding(torch.arange(32.0).reshape(1, 2, 16))
    unet = tiny("unet").model
    places = ("mid", "up")
    denoiser = TokenDenoiser(unet, num_tokens=3, time_buckets=None, init=start, blocks=places)
    assert denoiser.tokens.tokens.shape == (2, 3, 16) and denoiser.tokens.time_tokens is None
    assert (denoiser.tokens.tokens == torch.arange(16.0)).all()
    assert denoiser.attached.backbone.places == places == UNetBackbone(iter(places)).places
    sd3 = TokenDenoiser(tiny("sd3").model, num_layers=2, banks="shared", time_buckets=7)
    assert sd3.tokens.tokens.shape == (1, 2, 4, 24) and sd3.tokens.banks == "shared"
    assert sd3.tokens.time_tokens.num_embeddings == 7


def test_its_parameters_are_the_models_and_the_tokens():
    model = tiny("sd3").model
    denoiser = TokenDenoiser(model)
    names = {f"model.{name}" for name in model.state_dict()}
    assert denoiser.state_dict().keys() == names | {"tokens.tokens", "tokens.time_tokens.weight"}
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert trained == {"tokens.tokens", "tokens.time_tokens.weight"}


@pytest.mark.parametrize(("name", "settings"), [("unet", {"blocks": ("mid", "up")}), ("sd3", {})])
def test_saved_tokens_load_again_equal(name, settings, tmp_path):
    made, other = tiny(name), tiny(name)
    denoiser = TokenDenoiser(made.model, **settings)
    with torch.no_grad():
        for parameter in denoiser.tokens.parameters():
            parameter.copy_(torch.randn_like(parameter))
    inputs, bank = hosts_inputs(name), torch.tensor([0, 1, -1])
    expected = denoiser(**inputs, bank=bank)
    denoiser.save_pretrained(tmp_path / "new", base_model="org/base", training={"lr": 0.1})
    saved = SavedTokens.from_pretrained(tmp_path / "new")
    assert saved.base_model == "org/base" and saved.training == {"lr": 0.1}
    assert (
        saved.config()
        == SavedTokens.of(denoiser.attached, base_model="org/base", training={"lr": 0.1}).config()
    )
    further = TokenDenoiser(other.model, tokens=saved.attach(other.model))
    assert torch.equal(further(**inputs, bank=bank), expected)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_model_that_is_wrapped_already(name):
    made, x = tiny(name), hosts_inputs(name)
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
    bare = TokenDenoiser(made.model, tokens=tokens)
    expected = bare(**x, bank=Bank.NEGATIVE)
    bare.detach()
    lora = LoraConfig(r=2, target_modules=["to_q"])
    for wrap in (Wrapped, lambda model: get_peft_model(model, lora)):
        wrapped = wrap(made.model)
        denoiser = TokenDenoiser(wrapped, tokens=tokens)
        assert denoiser.model is wrapped and denoiser.attached.model is made.model
        torch.testing.assert_close(denoiser(**x, bank=Bank.NEGATIVE), expected)
        denoiser.detach()
    compiled = torch.compile(tiny(name).model)
    assert TokenDenoiser(compiled).attached.model is unwrap(compiled)


def test_new_tokens_inside_ddp_are_warned_of():
    """Their gradients would differ between the processes."""
    made = tiny("sd3")
    with pytest.warns(UserWarning, match=r"not be averaged over the processes: DDP wraps"):
        TokenDenoiser(Wrapped(made.model)).detach()
    made.model.soft_tokens = make_soft_tokens(made.model)  # as its remedy says
    denoiser = TokenDenoiser(Wrapped(made.model), tokens=made.model.soft_tokens)
    assert set(denoiser.tokens.parameters()) <= set(denoiser.model.parameters())


@pytest.mark.unchecked_shapes
def test_refused_tokens():
    made, x = tiny("unet"), tiny("unet").inputs()
    bare = made.model(**x)[0]
    tokens = make_soft_tokens(made.model)
    for settings in ({"num_tokens": 2}, {"init": torch.zeros(16)}, {"time_buckets": None}):
        with pytest.raises(ValueError, match=rf"^tokens: .*got both \({next(iter(settings))}\)"):
            TokenDenoiser(made.model, tokens=tokens, **settings)
    with pytest.raises(TypeError, match=r"got str\. For saved ones .*from_pretrained\(folder\)"):
        TokenDenoiser(made.model, tokens="folder")
    with pytest.raises(ValueError, match=r"expected dim=16.*got dim=24"):
        TokenDenoiser(made.model, tokens=SoftTokens(24))
    with pytest.raises(TypeError, match=r"no soft tokens for Linear\. Supported"):
        TokenDenoiser(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="num_layers: expected None"):
        TokenDenoiser(made.model, num_layers=2)
    assert torch.equal(made.model(**x)[0], bare)
    attached = attach_soft_tokens(made.model, tokens)
    with pytest.raises(RuntimeError, match=r"attached already.*tokens=attached"):
        TokenDenoiser(made.model)
    with pytest.raises(ValueError, match=r"blocks: expected None with tokens that are attached"):
        TokenDenoiser(made.model, tokens=attached, blocks=("mid",))
    attached.detach()
    with pytest.raises(ValueError, match=r"expected attached tokens, got detached ones"):
        TokenDenoiser(made.model, tokens=attached)


def test_what_belongs_to_the_image_is_not_conditioning():
    noisy, t, cond, image = batch_for("unet_sdxl")
    with pytest.raises(ValueError, match=r"add_time_ids.*image_conditioning="):
        PlainDenoiser(tiny("unet_sdxl").model)(noisy, t, {**cond, **image}, Bank.POSITIVE)


def lumina2():
    """The callable of the error's text, run as it is written there."""
    model = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    with pytest.raises(TypeError, match="Give AGSMRegularizer a callable") as caught:
        PlainDenoiser(model)
    told = str(caught.value)
    guide = Path(__file__).parents[2] / "integrations" / "README.md"
    assert (
        CALLABLE in told
        and CALLABLE in guide.read_text()
        and "takes: hidden_states, timestep, encoder" in told
    )
    names = {"transformer": model, "AGSMRegularizer": AGSMRegularizer, "AGSMLoss": AGSMLoss}
    exec(CALLABLE, names)  # noqa: S102
    return Lumina2Pipeline, model, names["denoiser"], names["agsm"]


def chroma():
    model = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
        approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1,
    )  # fmt: skip

    def denoiser(noisy, timesteps, conditioning, bank, **image):
        text, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
        rows = patches(noisy)
        ids = torch.cartesian_prod(
            *map(torch.arange, (1, noisy.shape[2] // 2, noisy.shape[3] // 2))
        )
        out = model(
            rows, encoder_hidden_states=text, timestep=timesteps / 1000, return_dict=False,
            img_ids=ids, txt_ids=torch.zeros(text.shape[1], 3),
            attention_mask=torch.cat([mask, mask.new_ones(rows.shape[:2])], dim=1),
        )  # fmt: skip
        return unpatched(out[0], noisy)

    agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
    return ChromaPipeline, model, denoiser, agsm


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # of Chroma's own
@pytest.mark.parametrize("made", [lumina2, chroma])
def test_any_other_transformer_is_a_callable(made):
    """It gives what its pipeline steps with, and trains a LoRA."""
    kind, model, denoiser, agsm = made()
    with torch.no_grad():
        for parameter in model.requires_grad_(False).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask = torch.tensor([[1] * TEXT, [1] * 4 + [0] * 2]).bool()
    text = {"prompt_embeds": torch.randn(2, TEXT, 16), "prompt_attention_mask": mask}
    null = {name: rows[1:] for name, rows in text.items()}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = kind(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    noise, size = torch.randn(2, 4, 4, 4), {"height": 32, "width": 32}
    given = pipe._pack_latents(noise, 2, 4, 4, 4) if made is chroma else noise
    wanted = pipe(**text, **size, latents=given, guidance_scale=1.0, num_inference_steps=2,
                  output_type="latent").images  # fmt: skip
    with torch.no_grad():
        got = sample_latents(
            lambda x, t: denoiser(x, t, text, Bank.OFF), pipe.scheduler, noise, num_steps=2,
            sigmas=[1.0, 0.5],
        )  # fmt: skip
    torch.testing.assert_close(patches(got) if made is chroma else got, wanted)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    t = torch.tensor([100.0, 900.0])
    agsm(noise, t, noise, text, ["a", "b"], null=null).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
