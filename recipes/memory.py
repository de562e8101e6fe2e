"""What training a model takes of a GPU's memory, from its config alone: no weights, no GPU.

    python recipes/memory.py --model sdxl --train lora
    python recipes/memory.py --model <folder or hub id> --train full --num_processes 8 --fsdp

`--model` is sd15, sdxl, sd3 or flux (Flux.1-dev), whose configs are in `configs/memory/`, or any
pipeline of these kinds. Parts that stay for the whole run are counted. What a pass holds is
measured: the denoiser runs forward and backward on tensors without data, with attention that never
holds its matrix and autocast's casts, and the bytes that are alive at once are counted. AGSM ranks
K captions an image in one pass without gradient. Soft tokens are then trained under all K, a LoRA
and the whole denoiser under the matching one, as the recipes do by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from run.cli import command
from run.options import OptionSet, option

CARDS = (16, 24, 48, 80, 141)
SPARE = 0.1
"""This share of a card is left for CUDA itself, its workspaces and the allocator's gaps."""
TEXT = {"StableDiffusionPipeline": 77, "StableDiffusionXLPipeline": 77,
        "StableDiffusion3Pipeline": 77 + 256, "FluxPipeline": 512}  # fmt: skip
"""Tokens of a prompt, as the pipelines encode it."""


@dataclass(frozen=True)
class Options:
    """The command's options."""

    model: str = option("sd15", "sd15, sdxl, sd3, flux, or a pipeline: a folder or a hub id.")
    train: Literal["tokens", "lora", "full"] = option("tokens", "What is trained.")
    num_tokens: int = option(4, "Soft tokens per layer, with --train tokens.", at_least=1)
    rank: int = option(8, "Rank of the LoRA, with --train lora.", at_least=1)
    resolution: int = option(0, "Side of the images in pixels; 0: the model's own.", at_least=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option("bf16", "As the recipes'.")
    train_batch_size: int = option(4, "Images per process and micro-step.", at_least=1)
    num_negatives: int = option(3, "Negatives per image; K is one more.", at_least=1)
    precompute: bool = option(False, "The text encoders and the VAE are on the CPU.")
    reference: bool = option(False, "With --train full, a frozen copy of it: DPO's reference.")
    num_processes: int = option(1, "GPUs.", at_least=1)
    fsdp: bool = option(False, "Shard what belongs to the denoiser over the GPUs, by FSDP2.")


class Line(NamedTuple):
    """Bytes that a pass holds, by its number of samples."""

    first: float
    each: float

    def __call__(self, samples: int) -> float:
        return self.first + self.each * samples


@dataclass(frozen=True)
class Needs:
    """What training takes of one GPU.

    parts: what stays, in bytes by name. ranking: the pass without gradient. plain, checkpointed:
    the trained passes without and with gradient checkpointing.
    """

    parts: dict[str, float]
    ranking: Line
    plain: Line
    checkpointed: Line
    all_captions: bool

    def passes(self, batch: int, captions: int) -> tuple[float, float]:
        """What they hold, without and with gradient checkpointing."""
        trained = batch * (captions if self.all_captions else 1)
        ranked = self.ranking(batch * captions)
        return max(ranked, self.plain(trained)), max(ranked, self.checkpointed(trained))

    def total(self, batch: int, captions: int) -> tuple[float, float]:
        plain, checkpointed = self.passes(batch, captions)
        stays = sum(self.parts.values())
        return stays + plain, stays + checkpointed


def configs(model: str) -> dict[str, Any]:
    """`_class_name` of the pipeline, and [class, config] of each of its models."""
    shipped = Path(__file__).parent / "configs" / "memory" / f"{model}.json"
    if shipped.exists():
        return dict(json.loads(shipped.read_text()))
    import diffusers
    import transformers

    index = diffusers.DiffusionPipeline.load_config(model)
    found: dict[str, Any] = {"_class_name": index["_class_name"]}
    for name, about in index.items():
        if not isinstance(about, list) or not about[1]:
            continue
        if name in ("unet", "transformer", "vae"):
            kind = getattr(diffusers, about[1])
            found[name] = [about[1], kind.load_config(model, subfolder=name)]
        elif name.startswith("text_encoder"):
            kind = getattr(transformers, about[1]).config_class
            found[name] = [about[1], kind.from_pretrained(model, subfolder=name).to_dict()]
    return found


def make(name: str, config: dict[str, Any]) -> Any:
    """The model of a class and a config, on the meta device."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(config)
        kind = getattr(transformers, name)
        return kind(kind.config_class.from_dict(config))


def needs(options: Any) -> Needs:
    """What the options take of one GPU."""
    import torch

    from model.live_memory import checkpointing, passes

    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    low = dtype[options.mixed_precision]
    autocast = None if low is torch.float32 else low
    about = configs(options.model)
    kind = about.pop("_class_name")
    if kind not in TEXT:
        raise ValueError(f"model: expected one of {sorted(TEXT)}, got a {kind}.")
    models = {name: make(*parts) for name, parts in about.items()}
    network = models.pop("unet", None) or models.pop("transformer")
    module = trained_module(options, network, torch.float32 if options.train == "full" else low)
    inputs = inputs_of(options, kind, network, models["vae"])

    def line(gradient: bool) -> Line:
        one, two = (passes(module, inputs(number), autocast, gradient) for number in (1, 2))
        return Line(max(0, 2 * one - two), two - one)

    ranking, plain = line(False), line(True)
    network.enable_gradient_checkpointing(checkpointing(autocast))
    checkpointed = line(True)
    parts = parts_of(options, module, models, low)
    return Needs(parts, ranking, plain, checkpointed, options.train == "tokens")


def trained_module(options: Any, network: Any, dtype: Any) -> Any:
    """The denoiser as the recipes train it."""
    import torch

    from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
    from model.pipeline import add_lora

    network.to(dtype).requires_grad_(options.train == "full").train()
    if options.train == "tokens":
        with torch.device(network.device):
            return TokenDenoiser(network, num_tokens=options.num_tokens)
    if options.train == "lora":
        add_lora(network, options.rank)
    return PlainDenoiser(network)


def inputs_of(options: Any, kind: str, network: Any, vae: Any) -> Callable[[int], Any]:
    """Number of samples -> noisy latents, timesteps, conditioning, image conditioning."""
    import torch

    config = network.config
    width = config.get("joint_attention_dim") or config.cross_attention_dim
    pooled = config.get("pooled_projection_dim")
    if kind == "StableDiffusionXLPipeline":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    blocks = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    scale = 2 ** (len(blocks) - 1)
    side = options.resolution // scale if options.resolution else config.get("sample_size", 128)

    def make_inputs(number: int) -> Any:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(number, *shape, device="meta")

        text = {"prompt_embeds": empty(TEXT[kind], width)}
        text |= {"pooled_prompt_embeds": empty(pooled)} if pooled else {}
        image = {"add_time_ids": empty(6)} if kind == "StableDiffusionXLPipeline" else {}
        image |= {"guidance": empty()} if config.get("guidance_embeds") else {}
        return empty(vae.config.latent_channels, side, side), empty(), text, image

    return make_inputs


def parts_of(options: Any, module: Any, others: dict[str, Any], low: Any) -> dict[str, float]:
    """Bytes of what stays on one GPU."""

    def size(parameters: Any, each: float | None = None) -> float:
        return float(sum(p.numel() * (each or p.element_size()) for p in parameters))

    every = [*module.parameters(), *module.buffers()]
    trained = [p for p in module.parameters() if p.requires_grad]
    parts = {
        "denoiser": size(every),
        "gradients": size(trained),
        "AdamW": 2 * size(trained),
        "EMA": size(trained),
    }
    if options.reference and options.train == "full":
        parts["reference"] = size(trained)
    if options.fsdp:
        parts = {name: value / options.num_processes for name, value in parts.items()}
        blocks = [part for part in module.modules() if type(part).__name__ == "ModuleList"]
        sizes = [size(one.parameters(), low.itemsize) for part in blocks for one in part]
        parts["two gathered blocks"] = 2 * max(sizes)
    elif options.num_processes > 1:
        parts["DDP's buckets"] = size(trained)
    if not options.precompute:
        encoders = [p for n, one in others.items() if n != "vae" for p in one.parameters()]
        each = 4 if options.train == "full" else low.itemsize  # as the recipes load them
        parts["text encoders"] = size(encoders, each)
        parts["VAE (float32)"] = size(others["vae"].parameters(), 4)
    return parts


def table(options: Any, found: Needs) -> list[str]:
    """The lines to print."""
    batch, captions = options.train_batch_size, 1 + options.num_negatives

    def line(name: str, *cells: Any) -> str:
        return f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)

    def of_bytes(name: str, *values: float) -> str:
        return line(name, *(f"{value / 2**30:.2f}" for value in values))

    lines = [line("GB of one GPU", "plain", "checkpointed")]
    lines += [of_bytes(name, value, value) for name, value in found.parts.items()]
    lines.append(of_bytes(f"passes: batch {batch}, K {captions}", *found.passes(batch, captions)))
    lines.append(of_bytes("in all", *found.total(batch, captions)))
    for what, least, needed in (
        (f"largest K at batch {batch}", 2, lambda k: found.total(batch, k)),
        (f"largest batch at K {captions}", 1, lambda n: found.total(n, captions)),
    ):
        lines += ["", line(what, "plain", "checkpointed")]
        for card in CARDS:
            most = (one if one >= least else "-" for one in largest(needed, card))
            lines.append(line(f"  {card} GB", *most))
    return lines


def largest(needed: Callable[[int], tuple[float, float]], card: int) -> list[int]:
    """The largest numbers, up to 1024, that fit without and with checkpointing; 0: none."""
    room = (1 - SPARE) * card * 2**30
    return [sum(needed(n)[way] <= room for n in range(1, 1025)) for way in (0, 1)]


OPTIONS = OptionSet(Options)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    options = OPTIONS.parse(__doc__, arguments)
    print("\n".join(table(options, needs(options))))


if __name__ == "__main__":
    command(main)
