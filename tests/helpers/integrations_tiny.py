"""Tiny configurations of the stock diffusers denoisers, and inputs for them."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)

TEXT = 6  # rows of text


@dataclass
class Tiny:
    name: str
    model: Any
    width: int
    timestep_scale: float = 1.0

    def inputs(self, batch=2, seed=0, timestep=None):
        """Keyword arguments of the denoiser, float64."""
        g = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

        t = torch.tensor([37.0, 905.0, 410.0, 700.0, 5.0, 999.0][:batch]).double()
        if timestep is not None:
            t = torch.full((batch,), float(timestep)).double()
        common = {"timestep": t * self.timestep_scale, "return_dict": False}
        if self.name.startswith("unet"):
            out = {"sample": randn(4, 8, 8), "encoder_hidden_states": randn(TEXT, 16)}
            if self.name == "unet_sdxl":
                ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * batch).double()
                out["added_cond_kwargs"] = {"text_embeds": randn(12), "time_ids": ids}
            return out | common
        if self.name.startswith("sd3"):
            return common | {
                "hidden_states": randn(4, 8, 8),
                "encoder_hidden_states": randn(TEXT, 16),
                "pooled_projections": randn(12),
            }
        if self.name == "flux":
            return common | {
                "hidden_states": randn(9, 4),
                "encoder_hidden_states": randn(TEXT, 16),
                "pooled_projections": randn(12),
                "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 3, 3))).double(),
                "txt_ids": torch.zeros(TEXT, 3).double(),
                "guidance": torch.full((batch,), 3.5).double(),
            }
        if self.name == "flux2":
            return common | {
                "hidden_states": randn(9, 8),
                "encoder_hidden_states": randn(TEXT, 12),
                "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 3, 3, 1))),
                "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT))),
                "guidance": torch.full((batch,), 3.5).double(),
            }
        if self.name == "z_image":
            images, texts = randn(4, 1, 4, 4), randn(40, 16)
            return {
                "x": list(images), "t": (1000 - t) / 1000, "return_dict": False,
                # padded to 32 and 64
                "cap_feats": [*texts[:-1], texts[-1, :TEXT]],
            }  # fmt: skip
        if self.name == "qwen":
            mask = torch.ones(batch, TEXT, dtype=torch.long)
            mask[-1, 4:] = 0
            return common | {
                "hidden_states": randn(9, 16),
                "encoder_hidden_states": randn(TEXT, 16),
                "encoder_hidden_states_mask": mask,
                "img_shapes": [[(1, 3, 3)]] * batch,
            }
        mask = torch.ones(batch, TEXT).double()
        mask[-1, 4:] = 0
        return common | {
            "hidden_states": randn(4, 4, 4),
            "encoder_hidden_states": randn(TEXT, 16),
            "encoder_attention_mask": mask,
        }


UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
    "transformer_layers_per_block": (1, 2),
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "caption_projection_dim": 24,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
}


def run(model, **inputs):
    """Its prediction; of Z-Image's list of images a tensor."""
    out = model(**inputs)[0]
    return torch.stack(out) if isinstance(out, list) else out


def tiny(name, dtype=torch.float64) -> Tiny:
    """One of NAMES, seeded, in evaluation mode."""
    torch.manual_seed(0)
    if name == "unet":
        made = Tiny(name, UNet2DConditionModel(**UNET), 16)
    elif name == "unet_sdxl":
        made = Tiny(name, UNet2DConditionModel(**UNET, **SDXL), 16)
    elif name == "sd3":
        made = Tiny(name, SD3Transformer2DModel(**SD3), 24)
    elif name == "sd3.5":
        extra = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
        made = Tiny(name, SD3Transformer2DModel(**SD3, **extra), 24)
    elif name == "flux":
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=12,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 4),
        )
        made = Tiny(name, model, 24, 1e-3)
    elif name in ("flux2", "klein"):
        model = Flux2Transformer2DModel(
            in_channels=8,
            num_layers=3,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            guidance_embeds=name == "flux2",
            axes_dims_rope=(4, 4, 4, 4),
        )
        made = Tiny(name, model, 32, 1e-3)
    elif name == "z_image":
        model = ZImageTransformer2DModel(
            in_channels=4,
            dim=24,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 4],
            axes_lens=[600, 32, 32],
        )
        made = Tiny(name, model, 24)
    elif name == "qwen":
        model = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        )
        made = Tiny(name, model, 24, 1e-3)
    else:
        model = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=12,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=4,
        )
        made = Tiny(name, model, 24)
    made.model = made.model.double().eval().requires_grad_(False)
    with torch.no_grad():  # zero-initialised gates and outputs would hide the text
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.model = made.model.to(dtype)
    return made


NAMES = ("unet", "unet_sdxl", "sd3", "sd3.5", "flux", "flux2", "qwen", "sana", "z_image")
LAYERED = NAMES[2:]
