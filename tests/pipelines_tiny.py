"""Tiny stock pipelines in a saved folder, loaded as any other model path."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from integrations_tiny import tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "two", "red", "blue", "circle", "circles", "square", "cat")


def vae(scaling=0.18):
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=scaling,
        shift_factor=0.0,
    )


def text_parts(folder):
    """CLIP tokenizer of a few words and text model of width 16."""
    folder.mkdir(parents=True)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)]
    letters = sorted({c for w in WORDS for c in w})
    vocabulary += [*letters, *(f"{c}</w>" for c in letters)]
    names = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(names))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, CLIPTextModel(config)


def saved_pipeline(name, folder):
    """Folder of a stock pipeline: "unet" (SD1.5), "unet_sdxl" or "sd3"."""
    torch.manual_seed(0)
    model = tiny(name, torch.float32).model
    ddim = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
    )
    if name == "unet":
        tokenizer, text_encoder = text_parts(folder / "words")
        pipe = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=model,
            scheduler=ddim,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif name == "unet_sdxl":
        pipe = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=model,
            scheduler=ddim,
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusion3Pipeline(
            transformer=model,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
