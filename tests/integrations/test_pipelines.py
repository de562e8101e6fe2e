"""Stock pipelines from a saved folder: the tokens of each branch, against a loop by hand."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from peft import LoraConfig
from pipelines_tiny import saved_pipeline, speaking_pipeline

from agsm_loss import Bank
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens
from agsm_loss.integrations.tokens.pipelines import (
    Sampling,
    denoiser_of,
    load_soft_tokens,
    set_sampling,
)
from agsm_loss.integrations.tokens.saved import SavedTokens

STEPS, GUIDANCE = 3, 4.0
NAMES = ("unet", "unet_sdxl", "sd3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: saved_pipeline(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def load(folder):
    parts = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, part in parts.items() if part == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(name):
    g = torch.Generator().manual_seed(5)
    out = {
        "prompt_embeds": torch.randn(2, 6, 16, generator=g),
        "negative_prompt_embeds": torch.randn(2, 6, 16, generator=g),
    }
    if name != "unet":
        out["pooled_prompt_embeds"] = torch.randn(2, 12, generator=g)
        out["negative_pooled_prompt_embeds"] = torch.randn(2, 12, generator=g)
    return out


def sample(pipe, name, guidance=GUIDANCE, **settings):
    return pipe(
        **prompts(name),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        height=8,
        width=8,
        output_type="latent",
        **settings,
    ).images


def tokens_of(pipe):
    torch.manual_seed(11)
    return make_soft_tokens(denoiser_of(pipe), num_tokens=2, std=1.0)


def one_layer_of(pipe):
    return make_soft_tokens(denoiser_of(pipe), num_tokens=2, num_layers=1, std=1.0)


def by_hand(pipe, name, attached, unconditional, conditional):
    """Classifier-free guidance with a call of its own for each branch."""
    model, scheduler, p = denoiser_of(pipe), pipe.scheduler, prompts(name)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    scheduler.set_timesteps(STEPS)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)

    def predict(sign, bank, t):
        extra = {}
        text, pooled = p[f"{sign}prompt_embeds"], p.get(f"{sign}pooled_prompt_embeds")
        if name == "unet_sdxl":
            ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        with torch.no_grad(), attached.using(bank):
            if name == "sd3":
                return model(latents, text, pooled, t.expand(2), return_dict=False)[0]
            return model(latents, t, text, return_dict=False, **extra)[0]

    for t in scheduler.timesteps:
        without, given = predict("negative_", unconditional, t), predict("", conditional, t)
        guided = without + GUIDANCE * (given - without)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_equals_a_hand_written_loop(name, folders):
    pipe = load(folders[name])
    bare = sample(pipe, name)
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    plus, minus, off = Bank.POSITIVE, Bank.NEGATIVE, Bank.OFF
    seen = []
    for sampling, banks in (
        (Sampling.BOTH, (plus, plus)),
        (Sampling.NEGATIVE_UNCONDITIONAL, (minus, plus)),
        (Sampling.CONDITIONAL_ONLY, (off, plus)),
        (Sampling.OFF, (off, off)),
    ):
        set_sampling(pipe, attached, sampling)
        ours = sample(pipe, name)
        torch.testing.assert_close(
            ours, by_hand(pipe, name, attached, *banks), rtol=1e-3, atol=1e-4
        )
        seen.append(ours)
    assert torch.equal(seen[3], bare)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])
    attached.detach()
    assert torch.equal(sample(pipe, name), bare)


def watched(attached):
    """The banks of each call's rows, with the rows' texts."""
    seen, make = [], attached._make

    def see(call, banks, batch):
        seen.append((call[attached.backbone.text], banks))
        return make(call, banks, batch)

    attached._make = see
    return seen


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("sampling", [Sampling.NEGATIVE_UNCONDITIONAL, Sampling.CONDITIONAL_ONLY])
def test_skip_layer_guidance_has_a_call_of_conditional_rows(sampling, number, folders):
    pipe = load(folders["sd3"])
    given = {key: value[:number] for key, value in prompts("sd3").items()}
    attached = load_soft_tokens(pipe, one_layer_of(pipe), sampling)
    seen = watched(attached)
    pipe(
        **given, num_inference_steps=2, height=8, width=8, output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
    )  # fmt: skip
    assert number in {len(text) for text, _ in seen}
    for text, banks in seen:
        for row, bank in zip(text, banks, strict=True):
            conditional = any(torch.equal(row, one) for one in given["prompt_embeds"])
            assert (bank == Bank.POSITIVE) == conditional
    attached.detach()
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_rows_are_known_by_their_texts_in_any_order(name, folders):
    pipe, given = load(folders[name]), prompts(name)
    attached = load_soft_tokens(pipe, tokens_of(pipe), Sampling.NEGATIVE_UNCONDITIONAL)
    seen = watched(attached)
    sample(pipe, name)
    text, negative = given["prompt_embeds"], given["negative_prompt_embeds"]
    pooled = given.get("pooled_prompt_embeds", torch.zeros(2, 12))

    def call(*rows):
        rows = torch.stack(rows)
        x, t = torch.randn(len(rows), 4, 8, 8), torch.tensor(500)
        model = denoiser_of(pipe)
        if name == "sd3":
            return model(x, rows, pooled[:1].expand(len(rows), -1), t.expand(len(rows)))
        return model(x, t, rows)

    for rows, banks in (
        ((text[0], text[1], negative[0], negative[1], text[0], text[1]), [0, 0, 1, 1, 0, 0]),
        ((text[0], negative[0], negative[0]), [0, 1, 1]),
        ((text[1],), [0]),
        ((negative[1],), [1]),
    ):
        call(*rows)
        assert seen[-1][1] == banks
    sample(pipe, name, guidance=1.0)
    assert seen[-1][1] == [0, 0]
    for rows in ((negative[0],), (text[0] + 1,)):  # not of an unguided call; of nobody
        with pytest.raises(ValueError, match="expected texts of the prompts of this"):
            call(*rows)
    variants = {"unet": StableDiffusionImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline}
    variant = variants[name].from_pipe(pipe)
    variant.set_progress_bar_config(disable=True)
    other = {key: value + 1 for key, value in given.items()}
    inputs = {"image": torch.rand(2, 3, 8, 8), "output_type": "latent", "num_inference_steps": 3}
    with pytest.raises(ValueError, match="set_sampling the pipeline that you call"):
        variant(**other, **inputs)
    set_sampling(variant, attached, Sampling.NEGATIVE_UNCONDITIONAL)
    variant(**other, **inputs)
    assert seen[-1][1] == [1, 1, 0, 0] and "encode_prompt" not in vars(pipe)


def test_the_branches_of_z_image_and_klein(tmp_path):
    """Z-Image's come in one call, in lists and in the other order; klein's in two."""
    pipe = load(speaking_pipeline("z_image", tmp_path))
    attached = load_soft_tokens(pipe, tokens_of(pipe), Sampling.NEGATIVE_UNCONDITIONAL)
    seen = watched(attached)
    call = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent"}
    for guidance, banks in ((3.0, [0, 0, 1, 1]), (0.0, [0, 0])):
        pipe(prompt=["a cat", "two red circles"], guidance_scale=guidance, **call)
        assert seen[-1][1] == banks
    set_sampling(pipe, attached, Sampling.CONDITIONAL_ONLY)
    assert pipe(prompt=["a cat"], **call).images.isfinite().all()
    klein = load(speaking_pipeline("klein", tmp_path / "klein"))
    with pytest.raises(ValueError, match="calls its denoiser separately for each branch"):
        load_soft_tokens(klein, tokens_of(klein), Sampling.NEGATIVE_UNCONDITIONAL)


def test_the_same_prompt_in_both_branches_has_their_usual_order(folders):
    pipe = load(folders["unet"])
    attached = load_soft_tokens(pipe, tokens_of(pipe), Sampling.NEGATIVE_UNCONDITIONAL)
    seen = watched(attached)
    for guidance, banks in ((3.0, [1, 0]), (1.0, [0])):
        pipe("", num_inference_steps=1, height=8, width=8, guidance_scale=guidance)
        assert seen[-1][1] == banks


@pytest.mark.parametrize("sampling", [Sampling.BOTH, Sampling.CONDITIONAL_ONLY])
def test_a_copy_of_a_pipeline_samples_as_it_does(sampling, folders):
    pipe = load(folders["unet"])
    attached = load_soft_tokens(pipe, tokens_of(pipe), sampling)
    expected, other = sample(pipe, "unet"), copy.deepcopy(pipe)
    attached.detach()
    assert torch.equal(sample(other, "unet"), expected)
    assert not torch.equal(sample(pipe, "unet"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_without_guidance_there_is_one_branch(name, folders):
    pipe = load(folders[name])
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    expected = sample(pipe, name, guidance=1.0)
    for sampling in (Sampling.NEGATIVE_UNCONDITIONAL, Sampling.CONDITIONAL_ONLY):
        set_sampling(pipe, attached, sampling)
        assert torch.equal(sample(pipe, name, guidance=1.0), expected)


def test_a_prompt_as_usual_from_saved_tokens(folders, tmp_path):
    pipe = load(folders["unet"])
    attached = attach_soft_tokens(pipe.unet, tokens_of(pipe), blocks=("down", "mid", "up"))

    def image():
        settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        return pipe("two red circles", generator=generator, **settings).images

    expected = image()
    SavedTokens.of(attached).save_pretrained(tmp_path)
    attached.detach()
    bare = image()
    again = load_soft_tokens(pipe, tmp_path)
    assert np.array_equal(image(), expected) and not np.array_equal(bare, expected)
    again.detach()
    assert np.array_equal(image(), bare)


def test_a_pipeline_that_is_saved_without_its_tokens_warns(folders, tmp_path):
    pipe = load(folders["unet"])
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    with pytest.warns(UserWarning, match=r"UNet2DConditionModel are not in its files.*SavedTokens"):
        pipe.save_pretrained(tmp_path, variant="fp16")  # the pipeline reads the call's signature
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe.save_pretrained(tmp_path)  # once
    copied = copy.deepcopy(pipe.unet)
    assert copied.save_pretrained.__self__ is copied
    attached.detach()
    assert "save_pretrained" not in vars(pipe.unet)
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    SavedTokens.of(attached).save_pretrained(tmp_path / "tokens")
    pipe.save_pretrained(tmp_path)  # they are saved as well
    assert pickle.loads(pickle.dumps(pipe.unet)).config == pipe.unet.config


def test_variants_share_the_denoiser_and_so_the_tokens(folders):
    pipe = load(folders["unet"])
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    parts = {**pipe.components, "requires_safety_checker": False}
    variants = {
        "img2img": (StableDiffusionImg2ImgPipeline(**parts), {"image": picture}),
        "inpaint": (
            StableDiffusionInpaintPipeline(**parts),
            {"image": picture, "mask_image": torch.ones(1, 1, 8, 8), "height": 8, "width": 8},
        ),
        "controlnet": (
            StableDiffusionControlNetPipeline(**parts, controlnet=control),
            {"image": torch.rand(1, 3, 8, 8)},
        ),
    }

    def run(variant, inputs):
        variant.set_progress_bar_config(disable=True)
        return variant(
            "two red circles",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **inputs,
        ).images

    bare = {n: run(*v) for n, v in variants.items()}
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    ours = {n: run(*v) for n, v in variants.items()}
    attached.detach()
    for n, v in variants.items():
        assert (ours[n] - bare[n]).abs().max() > 1e-3
        assert torch.equal(run(*v), bare[n])


def test_sd3_img2img(folders):
    pipe = load(folders["sd3"])
    variant = StableDiffusion3Img2ImgPipeline(**pipe.components)
    variant.set_progress_bar_config(disable=True)

    def run():
        return variant(
            **prompts("sd3"),
            image=torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    bare = run()
    attached = load_soft_tokens(variant, tokens_of(variant))
    assert (run() - bare).abs().max() > 1e-3
    attached.detach()
    assert torch.equal(run(), bare)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_lora_loaded_and_fused(name, folders):
    pipe = load(folders[name])
    model = denoiser_of(pipe)
    attached = load_soft_tokens(pipe, tokens_of(pipe))
    before = sample(pipe, name)
    torch.manual_seed(1)
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style"
    )
    loaded = sample(pipe, name)
    assert (loaded - before).abs().max() > 1e-3
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe, name), loaded, rtol=1e-2, atol=1e-3)
    attached.detach()


@pytest.mark.parametrize("attach_first", [False, True])
def test_with_offloading_hooks(folders, attach_first):
    """accelerate's hooks wrap forward, as enable_model_cpu_offload does on a GPU."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    pipe = load(folders["sd3"])
    tokens = tokens_of(pipe)
    attached = load_soft_tokens(pipe, tokens)
    expected = sample(pipe, "sd3")
    if not attach_first:
        attached.detach()
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu", offload=False))
    if not attach_first:
        attached = load_soft_tokens(pipe, tokens)
    assert torch.equal(sample(pipe, "sd3"), expected)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(sample(pipe, "sd3"), expected)
    attached.detach()


def test_tokens_are_loaded_into_an_offloaded_pipeline(folders):
    """As enable_sequential_cpu_offload leaves it: the weights are elsewhere until a call."""
    from accelerate import cpu_offload

    pipe = load(folders["sd3"])
    tokens = tokens_of(pipe)
    attached = load_soft_tokens(pipe, tokens)
    expected = sample(pipe, "sd3")
    attached.detach()
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            cpu_offload(model, torch.device("cpu"))
    assert next(pipe.transformer.parameters()).device.type == "meta"
    load_soft_tokens(pipe, tokens)
    assert torch.equal(sample(pipe, "sd3"), expected)


@pytest.mark.unchecked_shapes
def test_refusals(folders):
    pipe = load(folders["sd3"])
    with pytest.raises(TypeError, match="expected a Sampling, got 'both'"):
        load_soft_tokens(pipe, tokens_of(pipe), "both")

    class SeparateCalls:
        transformer = pipe.transformer

    with pytest.raises(
        ValueError, match="SeparateCalls calls its denoiser separately for each branch"
    ):
        load_soft_tokens(SeparateCalls(), tokens_of(pipe), Sampling.CONDITIONAL_ONLY)
    with pytest.raises(TypeError, match="expected a pipeline with a unet or a transformer"):
        denoiser_of(object())
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_soft_tokens(pipe, folders["sd3"])
    load_soft_tokens(pipe, tokens_of(pipe)).detach()  # none was left attached
    pipe.do_perturbed_attention_guidance = True
    attached = load_soft_tokens(pipe, tokens_of(pipe), Sampling.CONDITIONAL_ONLY)
    with pytest.raises(ValueError, match="third branch"):
        sample(pipe, "sd3")
    attached.detach()
