"""The two base architectures of the world, built from stock diffusers classes.

`FlowBase` holds what a `StableDiffusion3Pipeline` trains (SD3Transformer2DModel and two CLIP text
encoders, target eps - x_0) and `EpsilonBase` what a `StableDiffusionPipeline` trains
(UNet2DConditionModel and one CLIP text encoder, target eps). Both have the same face:

    model(latents, captions, generator)   per-image loss (B,)
    model.pipeline()                      the stock pipeline around the same modules

latents: (B, 3, 24, 24), the images in [-1, 1] times LATENT_SCALE. The VAE is a stock
AutoencoderTiny whose weights make it the identity, so diffusion runs on pixels and shapes stay
crisp; the transformer's 4x4 patches play the part of a VAE's downsampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lab.world.captions import vocabulary
from lab.world.scene import IMAGE_SIDE
from model.families import SILENT_WORDS

LATENT_SCALE = 2.0
MAX_TOKENS = 12  # the longest caption is 8 words, plus BOS and EOS
T5_LENGTHS = (1, 16, 256)  # lengths of the silent T5's zero tokens, see FlowBase
T5_CHANCES = (0.90, 0.08, 0.02)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first and ties by spelling, until each word is one."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in spelled):
        pairs = Counter(pair for word in spelled for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in spelled:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-pair encoding) in which every word of the world is one token."""
    words = vocabulary()
    merges = _merges(words)
    letters = sorted({letter for word in words for letter in word})
    pieces = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(pieces)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def identity_vae() -> AutoencoderTiny:
    """An AutoencoderTiny with vae.encode(image).latents * scaling_factor = LATENT_SCALE * image.

    The decoder begins with 3*tanh(z/3); with z = image / 32 that is the identity to within 4e-4
    of full scale, and every weight is a power of two, exact in half precision.
    """
    vae = AutoencoderTiny(
        latent_channels=3,
        encoder_block_out_channels=(3,),
        decoder_block_out_channels=(3,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=32.0 * LATENT_SCALE,
    )
    convs = [part for part in vae.modules() if isinstance(part, nn.Conv2d)]
    # The encoder is given the image as [0, 1] and the decoder gives it back as [0, 1].
    settings = ((1.0, 0.0), (1 / 16, -1 / 32), (16.0, 0.5), (1.0, 0.0))
    for conv, (gain, bias) in zip(convs, settings, strict=True):
        nn.init.dirac_(conv.weight)
        conv.weight.data.mul_(gain)
        if conv.bias is not None:
            nn.init.constant_(conv.bias, bias)
    return vae.requires_grad_(False)


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str], device: torch.device) -> Tensor:
    """Captions -> (B, MAX_TOKENS) token ids, padded as the pipelines pad."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids.to(device)


def silent_t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder whose output (B, S, width) is exactly zero, and a tokenizer that knows no word.

    Stable Diffusion 3's pipeline cannot be reloaded without a third text encoder. This one says
    what the pipeline itself says where T5 is left out: zeros.
    """
    config = T5Config(
        vocab_size=SILENT_WORDS, d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config)
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
    return encoder.requires_grad_(False), tokenizer


@dataclass(frozen=True)
class NoiseLevels:
    """Draws noise levels in (0, 1): logit-normal around `logit`, or uniform.

    Captions decide above 0.7; of uniform draws seven in ten are below it.
    """

    logit: float = 1.2
    uniform: bool = False

    def __call__(self, number: int, generator: torch.Generator) -> Tensor:
        """(number,), by a CPU generator."""
        if self.uniform:
            return torch.rand(number, generator=generator)
        return torch.sigmoid(torch.randn(number, generator=generator) + self.logit)


class FlowBase(nn.Module):
    """Flow matching: x_t = (1 - s) x_0 + s eps with s logit-normal, target eps - x_0.

    The stock pipeline's third text encoder, T5, gives `max_sequence_length` (256 unless told
    otherwise) tokens, here zeros. Training varies their number, so that the model draws alike
    with 1 (fast: `pipe(prompt, max_sequence_length=1)`) and with 256.

    width, layers: of the transformer; heads have 32 channels. text_width: of each encoder.
    levels: of the noise, in training.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 6,
        text_width: int = 64,
        levels: NoiseLevels | None = None,
    ) -> None:
        super().__init__()
        self.levels = levels or NoiseLevels()
        self.tokenizer = build_tokenizer()
        config = _text_config(self.tokenizer, text_width)
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        self.denoiser = SD3Transformer2DModel(
            sample_size=IMAGE_SIDE,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=2 * text_width,
            pooled_projection_dim=2 * text_width,
            caption_projection_dim=width,
            pos_embed_max_size=IMAGE_SIDE // 4,
            qk_norm="rms_norm",
        )

    def encode(self, captions: Sequence[str], t5_length: int) -> tuple[Tensor, Tensor]:
        """As the pipeline's encode_prompt: (B, MAX_TOKENS + t5_length, C) and pooled (B, C)."""
        ids = token_ids(self.tokenizer, captions, self.denoiser.device)
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        zeros = hidden.new_zeros(len(ids), t5_length, hidden.shape[-1])
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return torch.cat([hidden, zeros], dim=1), pooled

    def forward(
        self, latents: Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """Per-image loss (B,). The generator lives on the CPU, so that any device draws alike."""
        draw = torch.multinomial(torch.tensor(T5_CHANCES), 1, generator=generator)
        text, pooled = self.encode(captions, T5_LENGTHS[int(draw)])
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigma = self.levels(len(latents), generator).to(latents)
        s = sigma[:, None, None, None]
        prediction = self.denoiser(
            hidden_states=(1 - s) * latents + s * noise,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return (prediction.float() - (noise - latents)).square().mean(dim=(1, 2, 3))

    def pipeline(self) -> StableDiffusion3Pipeline:
        """The stock pipeline that shares these modules."""
        text_encoder_3, tokenizer_3 = silent_t5(self.denoiser.config.joint_attention_dim)
        return StableDiffusion3Pipeline(
            transformer=self.denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
            vae=identity_vae().to(self.denoiser.device),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=text_encoder_3.to(self.denoiser.device),
            tokenizer_3=tokenizer_3,
        )


class EpsilonBase(nn.Module):
    """DDPM with Stable Diffusion's schedule, target eps.

    width: channels at full resolution; twice and four times that at 12x12 and 6x6. layers: of
    the 6x6 level, the only one with attention (one of its positions is 4x4 pixels, as the patches
    of FlowBase are); the others have one. levels: of t / 1000, in training.
    """

    def __init__(
        self,
        width: int = 24,
        layers: int = 2,
        text_width: int = 128,
        levels: NoiseLevels | None = None,
    ) -> None:
        super().__init__()
        self.levels = levels or NoiseLevels()
        self.tokenizer = build_tokenizer()
        self.text_encoder = CLIPTextModel(_text_config(self.tokenizer, text_width))
        self.denoiser = UNet2DConditionModel(
            sample_size=IMAGE_SIDE,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width, 4 * width),
            layers_per_block=(1, 1, layers),
            norm_num_groups=8,
            attention_head_dim=4,  # the number of heads, by diffusers' naming
            cross_attention_dim=text_width,
        )
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        )

    def forward(
        self, latents: Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """Per-image loss (B,). The generator lives on the CPU, so that any device draws alike."""
        ids = token_ids(self.tokenizer, captions, self.denoiser.device)
        text = self.text_encoder(ids).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = (1000 * self.levels(len(latents), generator)).long().to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        prediction = self.denoiser(noisy, steps, encoder_hidden_states=text, return_dict=False)[0]
        return (prediction.float() - noise).square().mean(dim=(1, 2, 3))

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline that shares these modules."""
        return StableDiffusionPipeline(
            unet=self.denoiser,
            scheduler=self.scheduler,
            vae=identity_vae().to(self.denoiser.device),
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


BASES: dict[str, type[FlowBase | EpsilonBase]] = {"flow": FlowBase, "epsilon": EpsilonBase}
