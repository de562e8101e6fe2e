"""Trainable parameters of the soft tokens, and what they cost a forward pass.

    python recipes/bench_backbones.py

Parameters are counted on the published configurations of SD1.5, SDXL and SD3 medium, built on the
meta device. The cost is measured on the same classes at a smaller width, at the real lengths of
text (77, and SD3's 333) and a 32x32 latent: the median of forward passes in turns, bare, tokens
attached but off, and on.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from agsm_loss import Bank
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens

SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
NARROW_UNET = {"block_out_channels": (64, 128, 256, 256), "sample_size": 32}
NARROW_SD3 = {"num_attention_heads": 6, "caption_projection_dim": 384, "sample_size": 32}


def parameters() -> None:
    print("trainable parameters, published settings (n = 4, 100 time tokens, L = 5 for SD3)")
    for name, make, config in (
        ("SD1.5", UNet2DConditionModel, SD15),
        ("SDXL", UNet2DConditionModel, SDXL),
        ("SD3", SD3Transformer2DModel, SD3),
    ):
        with torch.device("meta"):
            model = make(**config)
            tokens = make_soft_tokens(model)
        count = sum(p.numel() for p in tokens.parameters())
        whole = sum(p.numel() for p in model.parameters())
        print(f"  {name:6} {count:>9,} of {whole:,} ({100 * count / whole:.3f} %)")


def unet_inputs(model: Any) -> dict[str, Any]:
    text = torch.randn(2, 77, model.config.cross_attention_dim)
    return {"sample": torch.randn(2, 4, 32, 32), "timestep": 500, "encoder_hidden_states": text}


def sd3_inputs(model: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 32, 32),
        "encoder_hidden_states": torch.randn(2, 333, 4096),
        "pooled_projections": torch.randn(2, 2048),
        "timestep": torch.tensor([500.0, 500.0]),
    }


def overhead(name: str, model: Any, inputs: dict[str, Any], rounds: int) -> None:
    model.eval().requires_grad_(False)
    tokens = make_soft_tokens(model)

    def bare() -> None:
        model(**inputs)

    def using(bank: Bank) -> Callable[[], None]:
        def run() -> None:
            with attached.using(bank):
                model(**inputs)

        return run

    times: dict[str, list[float]] = {"bare": [], "off": [], "on": []}
    with torch.no_grad():
        bare()
        for _ in range(rounds):
            times["bare"].append(timed(bare))
            attached = attach_soft_tokens(model, tokens)
            times["off"].append(timed(using(Bank.OFF)))
            times["on"].append(timed(using(Bank.POSITIVE)))
            attached.detach()
    base = statistics.median(times["bare"])
    low, _, high = statistics.quantiles(times["bare"], n=4)
    ratios = {n: 100 * (statistics.median(times[n]) / base - 1) for n in ("off", "on")}
    print(
        f"  {name:5} bare {1e3 * base:.0f} ms (quartiles {1e3 * low:.0f}-{1e3 * high:.0f}), "
        f"off {ratios['off']:+.1f} %, on {ratios['on']:+.1f} %"
    )


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.manual_seed(0)
    parameters()
    print(f"a forward pass of 2 samples, narrower models, {args.rounds} rounds in turns")
    unet = UNet2DConditionModel(**SD15 | NARROW_UNET)
    overhead("UNet", unet, unet_inputs(unet), args.rounds)
    sd3 = SD3Transformer2DModel(**SD3 | NARROW_SD3)
    overhead("SD3", sd3, sd3_inputs(sd3), args.rounds)


if __name__ == "__main__":
    main()
