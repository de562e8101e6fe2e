"""The newer models: training sees the texts and latents that their stock pipelines see."""

import inspect

import pytest
import torch
from diffusers import FluxPipeline, ZImagePipeline
from integrations_tiny import tiny
from pipelines_tiny import speaking_pipeline

from agsm_loss import Bank
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.rollouts import sample_latents, sample_sde
from model.families import guidance, levels_of, scale_latents
from model.pipeline import TextToImage
from model.sampling import sample

TOLD = ["a red circle", "two blue circles", "a cat"]
MASKS = {
    "qwen": "prompt_embeds_mask", "sana": "prompt_attention_mask",
    "flux2": None, "klein": None, "z_image": "prompt_embeds_mask",
}  # fmt: skip


@pytest.fixture(scope="module", params=MASKS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def size(kind):
    side = 32 if kind == "sana" else 8
    return {"height": side, "width": side}


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    folder = speaking_pipeline(kind, tmp_path_factory.mktemp(kind) / "p")
    loaded = TextToImage.load(str(folder), torch.float32)
    if not MASKS[kind]:  # 512 would be slow
        loaded.arguments["max_sequence_length"] = 32
    return loaded


def seen(model, prompt, scale, size):
    """Text and mask of the denoiser's calls in the first of two steps of `pipe(prompt)`, by row."""
    rows, forward = [], inspect.signature(type(model.denoiser).forward)

    def see(module, args, given):
        call = forward.bind(module, *args, **given).arguments
        text = call.get("cap_feats", call.get("encoder_hidden_states"))
        mask = call.get("encoder_hidden_states_mask", call.get("encoder_attention_mask"))
        mask = [torch.ones(len(one)) for one in text] if mask is None else mask
        rows.extend(zip(text, mask, strict=True))

    handle = model.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    call = {**model.arguments, **size, **guidance(model.pipe, scale)}
    model.pipe(prompt=prompt, num_inference_steps=2, output_type="latent", **call)
    handle.remove()
    return rows[: len(rows) // 2]


def masks_of(got, kind):
    embeds = got["prompt_embeds"]
    return got[MASKS[kind]] if MASKS[kind] else torch.ones(embeds.shape[:2], dtype=torch.long)


def test_texts_are_encoded_as_in_a_call(model, kind, size):
    got = model.encode_prompts(TOLD)
    assert set(got) == {"prompt_embeds", MASKS[kind]} - {None}
    masks = masks_of(got, kind)
    for text, embeds, mask in zip(TOLD, got["prompt_embeds"], masks, strict=True):
        [(wanted, of)] = seen(model, text, 1.0, size)
        assert mask.sum() == of.sum() and not mask[of.long().sum() :].any()
        torch.testing.assert_close(embeds[mask.bool()], wanted[of.bool()])
    assert not torch.equal(*got["prompt_embeds"][:2])
    assert len({int(mask.sum()) for mask in masks}) > 1 or not MASKS[kind]


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(model, kind, size):
    got = model.encode_prompts(["", "a red circle"])
    if kind == "flux2":  # it has one pass, with the scale as an input
        rows = [*seen(model, "", 3.0, size), *seen(model, "a red circle", 3.0, size)]
    else:
        rows = seen(model, "a red circle", 3.0, size)
    rows = rows if kind in ("sana", "flux2") else rows[::-1]  # the others' empty one is the second
    for embeds, mask, (wanted, of) in zip(
        got["prompt_embeds"], masks_of(got, kind), rows, strict=True
    ):
        torch.testing.assert_close(embeds[mask.bool()], wanted[of.bool()])


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_padded_text_gives_what_it_gives_alone(model, kind, with_tokens):
    denoiser = (TokenDenoiser if with_tokens else PlainDenoiser)(model.denoiser)
    channels = 4 if MASKS[kind] else 8
    x, times = torch.randn(3, channels, 4, 4), torch.tensor([100.0, 500.0, 900.0])
    image = model.image_conditioning(torch.zeros(3, 3, 8, 8))
    with torch.no_grad():
        together = denoiser(x, times, model.encode_prompts(TOLD), Bank.POSITIVE, **image)
        for i, text in enumerate(TOLD):
            given = model.encode_prompts([text])
            own = {name: rows[i : i + 1] for name, rows in image.items()}
            alone = denoiser(x[i : i + 1], times[i : i + 1], given, Bank.POSITIVE, **own)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        other = denoiser(x, times, model.encode_prompts(TOLD[::-1]), Bank.POSITIVE, **image)
    assert not torch.allclose(other[0], together[0], atol=1e-4)
    if with_tokens:
        denoiser.detach()


def as_ours(model, kind, latents, side):
    """A pipeline's latents, of output_type "latent", as the denoiser takes them."""
    if kind == "qwen":
        return model.pipe._unpack_latents(latents, side, side, 1)[:, :, 0]
    if kind == "flux2":
        return latents.transpose(1, 2).unflatten(2, (side // 2, side // 2))
    return scale_latents(model.pipe.vae, latents) if kind == "klein" else latents


def test_latents_are_the_pipelines(model, kind, size):
    """Decoded as a call decodes them; and encoding is the inverse of that scaling."""
    call, side = {**model.arguments, **size, "num_inference_steps": 2}, size["height"]

    def run(output):
        generator = torch.Generator().manual_seed(0)
        return model.pipe(prompt="a cat", generator=generator, output_type=output, **call).images

    latents = as_ours(model, kind, run("latent"), side)
    pixels = model.decode_latents(latents)
    torch.testing.assert_close(pixels.clamp(-1, 1) / 2 + 0.5, run("pt"))
    images = torch.rand(2, 3, side, side) * 2 - 1
    got = model.encode_images(images, torch.Generator().manual_seed(0))
    assert got.shape == latents.expand(2, -1, -1, -1).shape
    vae = model.pipe.vae
    if kind == "sana":
        torch.testing.assert_close(got, vae.encode(images).latent * vae.config.scaling_factor)
        return
    spread = vae.encode(images[:, :, None] if kind == "qwen" else images).latent_dist
    if kind == "qwen":
        mean, std = (torch.tensor(vae.config[f"latents_{n}"])[:, None] for n in ("mean", "std"))
    elif kind == "z_image":
        mean, std = vae.config.shift_factor, 1 / vae.config.scaling_factor
    else:
        mean = vae.bn.running_mean[:, None]
        std = (vae.bn.running_var[:, None] + vae.config.batch_norm_eps).sqrt()
    plain = (got.flatten(2) * std + mean).reshape(got.shape)
    if MASKS[kind] is None:
        plain = model.pipe._unpatchify_latents(plain)
    far = (plain - spread.mean.reshape(plain.shape)) / spread.std.reshape(plain.shape)
    assert 0.8 < far.std() < 1.2  # a draw of the posterior


def test_rollouts_have_the_pipelines_noise_levels(model, kind):
    """Its own step from given latents is one by our prediction; the SDE runs to an image."""
    pipe, side = model.pipe, 32 if kind == "sana" else 4
    pixels = torch.zeros(1, 3, side, side)
    noise = torch.randn_like(model.encode_images(pixels))
    text, denoiser = model.encode_prompts(["a cat"]), PlainDenoiser(model.denoiser)
    image = model.image_conditioning(pixels)

    def denoise(x, times):
        return denoiser(x, times, text, Bank.POSITIVE, **image)

    scale = model.guidance if "guidance" in image else 1.0
    call = {**model.arguments, **guidance(pipe, scale), "height": side, "width": side}
    latents = pipe._pack_latents(noise, 1, 4, 4, 4) if kind == "qwen" else noise
    wanted = pipe(prompt="a cat", latents=latents, output_type="latent", num_inference_steps=5,
                  **call).images  # fmt: skip
    levels = levels_of(pipe, noise.shape[1:], 5)
    got = sample_latents(denoise, pipe.scheduler, noise, num_steps=5, **levels)
    torch.testing.assert_close(got, as_ours(model, kind, wanted, side), rtol=1e-4, atol=1e-4)
    trajectory = sample_sde(denoise, pipe.scheduler, noise, num_steps=5, **levels)
    assert trajectory.sigmas[0] > 0.99 and trajectory.sigmas[-1] == 0
    assert (trajectory.sigmas.diff() < 0).all() and trajectory.last.isfinite().all()


def test_guidance_of_every_scale_reaches_the_model(model, size):
    def drawn(scale):
        return sample(
            model.pipe, TOLD[:2], seeds=[0, 1], num_inference_steps=2, guidance_scale=scale,
            arguments={**model.arguments, **size},
        ).astype(float)  # fmt: skip

    without, weak, strong = drawn(1.0), drawn(3.0), drawn(30.0)
    assert not (weak == without).all() and not (strong == weak).all()


def test_flux_is_guided_by_its_input_or_by_a_second_pass():
    parts = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    dev = FluxPipeline(transformer=tiny("flux").model, **parts)
    assert guidance(dev, 3.5, 2) == {"guidance_scale": 3.5}
    dev.transformer.register_to_config(guidance_embeds=False)
    assert guidance(dev, 3.5, 2) == {"true_cfg_scale": 3.5, "negative_prompt": ["", ""]}
    assert guidance(dev, 1.0, 2) == {"true_cfg_scale": 1.0}


def test_z_images_pipeline_counts_guidance_from_zero():
    """It takes c + g(c - u), where the others' u + s(c - u) is s = g + 1."""
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipe = ZImagePipeline(transformer=tiny("z_image").model, **parts)
    assert guidance(pipe, 5.0) == {"guidance_scale": 4.0}
    assert guidance(pipe, 1.0) == guidance(pipe, 0.0) == {"guidance_scale": 0.0}
