"""Tiny stock pipelines in a saved folder, loaded as any other model path."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from integrations_tiny import tiny
from tokenizers import AddedToken, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = ("a", "two", "red", "blue", "circle", "circles", "square", "cat")


def vae(scaling=0.18, channels=4):
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=8,
        scaling_factor=scaling,
        shift_factor=0.0,
    )


def text_parts(width=16, projection=None):
    """CLIP tokenizer of a few words and text model, with a projection where one is given."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in WORDS)]
    letters = sorted({c for w in WORDS for c in w})
    vocabulary += [*letters, *(f"{c}</w>" for c in letters)]
    names = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = CLIPTokenizer(vocab=names, merges=[], model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection or width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return tokenizer, kind(config)


def t5_parts(width=16):
    """T5 tokenizer that knows the same words, and encoder."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{w}", -1.0) for w in WORDS)]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=8)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def bytes_tokenizer():
    """It has bytes, a chat template, and padding on the right."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_]
    tokenizer = Qwen2Tokenizer(vocab={one: i for i, one in enumerate(vocabulary)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": vocabulary[1:3]})
    tokenizer.chat_template = (  # little of a system's message, so that few tokens are enough
        "{% for m in messages %}<|im_start|>{{ m.content if m.content is string else "
        "m.content[0].text[:4] if m.role == 'system' else m.content[0].text }}<|im_end|>"
        "{% endfor %}"
    )
    return tokenizer


def decoder_config(layers):
    return {
        "vocab_size": 259, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": layers,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0,
    }  # fmt: skip


def flux2_pipeline(model):
    """dev's, or klein's for a model without guidance input; as many layers as they read from.

    dev's tokenizer is one here, in place of a processor that needs torchvision.
    """
    parts = {"vae": AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=4, latent_channels=2,
        layers_per_block=1, sample_size=8,
    )}  # fmt: skip
    parts["vae"].bn.running_mean.normal_()
    parts["vae"].bn.running_var.uniform_(0.5, 2.0)
    parts |= {
        "transformer": model,
        "tokenizer": bytes_tokenizer(),
        # as the released models'
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    if not model.config.guidance_embeds:
        encoder = Qwen3ForCausalLM(Qwen3Config(**decoder_config(27)))
        return Flux2KleinPipeline(**parts, text_encoder=encoder)
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}  # fmt: skip
    text = {"model_type": "mistral", **decoder_config(30)}
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision)
    )
    return Flux2Pipeline(**parts, text_encoder=encoder)


def z_image_pipeline(model):
    config = Qwen3Config(**{**decoder_config(2), "hidden_size": 16})
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling=0.36),
        text_encoder=Qwen3Model(config),
        tokenizer=bytes_tokenizer(),
        transformer=model,
    )


def qwen_pipeline(model):
    """Its scheduler's shift is that of the released model."""
    tokenizer = bytes_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5],
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=model,
    )  # fmt: skip


def sana_pipeline(model):
    """Its tokenizer knows the words, and takes any other text for one unknown token."""
    tokenizer = GemmaTokenizer()
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=512,
    )
    blocks = {"attention_head_dim": 4, "latent_channels": 4, "scaling_factor": 0.4}
    for part in ("encoder", "decoder"):
        blocks |= {
            f"{part}_block_out_channels": (8,) * 4,
            f"{part}_layers_per_block": (1,) * 4,
            f"{part}_qkv_multiscales": ((),) * 4,
        }
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config),
        vae=AutoencoderDC(**blocks),
        transformer=model,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def speaking_pipeline(name, folder):
    """As `saved_pipeline`, with real tokenizers and text encoders; also of the other models."""
    torch.manual_seed(0)
    model = tiny(name, torch.float32).model
    if name == "unet":
        return saved_pipeline(name, folder)
    made = {"qwen": qwen_pipeline, "sana": sana_pipeline, "z_image": z_image_pipeline,
            "flux2": flux2_pipeline, "klein": flux2_pipeline}  # fmt: skip
    if name in made:
        pipe = made[name](model)
    elif name == "flux":
        tokenizer, encoder = text_parts(width=12)
        t5, t5_tokenizer = t5_parts()
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(channels=1),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=model,
        )
    else:
        pooled = {"unet_sdxl": (None, 12), "sd3": (6, 6)}[name]
        (tokenizer, encoder), (tokenizer_2, encoder_2) = (
            text_parts(width=8, projection=pooled[i]) for i in range(2)
        )
        parts = {
            "vae": vae(),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            "text_encoder_2": encoder_2,
            "tokenizer_2": tokenizer_2,
        }
        if name == "unet_sdxl":
            pipe = StableDiffusionXLPipeline(
                **parts, unet=model, scheduler=DDIMScheduler(), add_watermarker=False
            )
        else:
            t5, t5_tokenizer = t5_parts()
            pipe = StableDiffusion3Pipeline(
                **parts,
                transformer=model,
                scheduler=FlowMatchEulerDiscreteScheduler(),
                text_encoder_3=t5,
                tokenizer_3=t5_tokenizer,
            )
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


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
        tokenizer, text_encoder = text_parts()
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
