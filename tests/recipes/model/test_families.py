"""Qwen-Image and Sana: training sees the texts and latents that their stock pipelines see."""

import pytest
import torch
from diffusers import FluxPipeline
from integrations_tiny import tiny
from pipelines_tiny import speaking_pipeline

from agsm_loss import Bank
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.rollouts import sample_latents, sample_sde
from model.families import guidance
from model.pipeline import TextToImage
from model.sampling import sample

TOLD = ["a red circle", "two blue circles", "a cat"]
SIZE = {"height": 32, "width": 32}
MASKS = {"qwen": "prompt_embeds_mask", "sana": "prompt_attention_mask"}


@pytest.fixture(scope="module", params=MASKS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    folder = speaking_pipeline(kind, tmp_path_factory.mktemp(kind) / "p")
    return TextToImage.load(str(folder), torch.float32)


def seen(model, prompt, scale):
    """Text and mask of the denoiser's calls in the first of two steps of `pipe(prompt)`, by row."""
    rows = []

    def see(module, args, given):
        text = given["encoder_hidden_states"]
        mask = given.get("encoder_hidden_states_mask", given.get("encoder_attention_mask"))
        mask = torch.ones(text.shape[:2]) if mask is None else mask
        rows.extend(zip(text, mask, strict=True))

    handle = model.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    call = {**model.arguments, **SIZE, **guidance(model.pipe, scale)}
    model.pipe(prompt, num_inference_steps=2, output_type="latent", **call)
    handle.remove()
    return rows[: len(rows) // 2]


def test_texts_are_encoded_as_in_a_call(model, kind):
    got = model.encode_prompts(TOLD)
    assert set(got) == {"prompt_embeds", MASKS[kind]}
    for text, embeds, mask in zip(TOLD, got["prompt_embeds"], got[MASKS[kind]], strict=True):
        [(wanted, of)] = seen(model, text, 1.0)
        assert mask.sum() == of.sum() and not mask[of.long().sum() :].any()
        torch.testing.assert_close(embeds[mask.bool()], wanted[of.bool()])
    assert len({int(mask.sum()) for mask in got[MASKS[kind]]}) > 1


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(model, kind):
    got = model.encode_prompts(["", "a red circle"])
    rows = seen(model, "a red circle", 3.0)
    rows = rows if kind == "sana" else rows[::-1]  # the empty one is Qwen-Image's second call
    for embeds, mask, (wanted, of) in zip(
        got["prompt_embeds"], got[MASKS[kind]], rows, strict=True
    ):
        torch.testing.assert_close(embeds[mask.bool()], wanted[of.bool()])


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_padded_text_gives_what_it_gives_alone(model, with_tokens):
    denoiser = (TokenDenoiser if with_tokens else PlainDenoiser)(model.denoiser)
    x, times = torch.randn(3, 4, 4, 4), torch.tensor([100.0, 500.0, 900.0])
    with torch.no_grad():
        together = denoiser(x, times, model.encode_prompts(TOLD), Bank.POSITIVE)
        for i, text in enumerate(TOLD):
            given = model.encode_prompts([text])
            alone = denoiser(x[i : i + 1], times[i : i + 1], given, Bank.POSITIVE)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        other = denoiser(x, times, model.encode_prompts(TOLD[::-1]), Bank.POSITIVE)
    assert not torch.allclose(other[0], together[0], atol=1e-4)
    if with_tokens:
        denoiser.detach()


def test_latents_are_the_pipelines(model, kind):
    """Decoded as a call decodes them; and encoding is the inverse of that scaling."""
    call = {**model.arguments, **SIZE, "num_inference_steps": 2}

    def run(output):
        generator = torch.Generator().manual_seed(0)
        return model.pipe("a cat", generator=generator, output_type=output, **call).images

    latents = run("latent")
    if kind == "qwen":
        latents = model.pipe._unpack_latents(latents, 32, 32, 1)[:, :, 0]
    pixels = model.decode_latents(latents)
    torch.testing.assert_close(pixels.clamp(-1, 1) / 2 + 0.5, run("pt"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    got = model.encode_images(images, torch.Generator().manual_seed(0))
    assert got.shape == latents.expand(2, -1, -1, -1).shape
    vae = model.pipe.vae
    if kind == "sana":
        torch.testing.assert_close(got, vae.encode(images).latent * vae.config.scaling_factor)
        return
    spread = vae.encode(images[:, :, None]).latent_dist
    mean, std = (
        torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std")
    )
    far = (got * std + mean - spread.mean[:, :, 0]) / spread.std[:, :, 0]
    assert 0.9 < far.std() < 1.1  # a draw of the posterior


def test_rollouts_have_the_pipelines_noise_levels(model, kind):
    """`sample_latents` gives what the pipeline does; the SDE runs from noise to an image."""
    pipe, noise = model.pipe, torch.randn(1, 4, 4, 4)
    text, denoiser = model.encode_prompts(["a cat"]), PlainDenoiser(model.denoiser)
    size = SIZE if kind == "sana" else {"height": 4, "width": 4}

    def denoise(x, times):
        return denoiser(x, times, text, Bank.POSITIVE)

    latents = noise if kind == "sana" else pipe._pack_latents(noise, 1, 4, 4, 4)
    call = {**model.arguments, **size, **guidance(pipe, 1.0), "num_inference_steps": 5}
    wanted = pipe("a cat", latents=latents, output_type="latent", **call).images
    if kind == "qwen":
        wanted = pipe._unpack_latents(wanted, 4, 4, 1)[:, :, 0]
    got = sample_latents(denoise, pipe.scheduler, noise, num_steps=5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    trajectory = sample_sde(denoise, pipe.scheduler, noise, num_steps=5)
    assert trajectory.sigmas[0] > 0.99 and trajectory.sigmas[-1] == 0
    assert (trajectory.sigmas.diff() < 0).all() and trajectory.last.isfinite().all()


def test_guidance_of_every_scale_reaches_the_model(model, kind):
    def drawn(scale):
        return sample(
            model.pipe, TOLD[:2], seeds=[0, 1], num_inference_steps=2, guidance_scale=scale,
            arguments={**model.arguments, **SIZE},
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
