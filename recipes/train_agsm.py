"""Trains soft tokens on a frozen text-to-image pipeline: AGSM, SoftREPA or plain denoising.

    python recipes/train_agsm.py --model recipes/models/flow
    accelerate launch recipes/train_agsm.py --config recipes/configs/agsm_sd3.yaml
    python recipes/train_agsm.py --model <folder or hub id> --data <parquet, folder or hub id>

`--model` is any Stable Diffusion, SDXL, SD3 or Flux.1 pipeline, a preference-tuned one too.
`--data world` (the default) renders the embedded world and scores validation prompts exactly;
other data give a sheet of `--prompts` instead. Under `--output`: tokens/ (SavedTokens), lora/ where one
was trained beside them, log.jsonl, sheets/, checkpoints/ (for `--resume`: the run goes on exactly as if it had not been stopped).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import TrainingOptions, option, parse

if TYPE_CHECKING:
    import torch

    from captioned import Batch
    from objectives import Inputs
    from text_to_image import TextToImage


@dataclass(frozen=True)
class Options(TrainingOptions):
    """Every option, its default and its meaning."""

    model: str = option("recipes/models/flow", "pipeline folder or hub id")
    output: str = option("runs/agsm", "folder for tokens, log, sheets and checkpoints")
    objective: str = option("agsm", "what is minimised", ("agsm", "softrepa", "denoising"))
    banks: str = option("dual", "banks of soft tokens", ("dual", "shared", "positive_only"))
    num_tokens: int = option(4, "soft tokens a layer")
    num_layers: int = option(0, "layers with tokens of their own; 0: 5, or all of fewer; -1: all")
    time_buckets: int = option(100, "time tokens; 0 for none")
    lora_rank: int = option(0, "a LoRA on the denoiser's attention, trained beside; 0 for none")
    pos_scale: float = option(1.0, "gamma+ of AGSM")
    neg_scale: float = option(0.1, "gamma- of AGSM")
    temperature: float = option(0.1, "T of AGSM's Plackett-Luce weights")
    entropy: float = option(0.0, "adapt T to this share of the weights' largest entropy; 0: fixed")
    ema_decay: float = option(0.9999, "of AGSM's EMA model")
    logit_scale: float = option(4.0, "s of SoftREPA")
    logit_temperature: float = option(0.07, "T of SoftREPA")
    denoising_weight: float = option(0.0, "of the denoising error in SoftREPA")
    negatives: str = option("in_batch", "the other captions", ("in_batch", "hard", "mixed"))
    num_negatives: int = option(
        3, "other captions an image; mixed: half of them edited, rounded up"
    )
    chunk_size: int = option(0, "samples a forward pass of AGSM may hold; 0: all at once")
    data: str = option("world", "world, a parquet, jsonl or csv file, an imagefolder, or a hub id")
    split: str = option("train", "of the data set")
    image_column: str = option("image", "of the data set")
    caption_column: str = option("caption", "of the data set")
    resolution: int = option(512, "pixels a side to which the data set's images are brought")
    timestep_density: str = option("uniform", "of training", ("uniform", "logit_normal"))
    timestep_low: float = option(0.0, "share of the schedule (0: clean) where training begins")
    timestep_high: float = option(1.0, "share of the schedule (1: pure noise) where it ends")
    gradient_checkpointing: bool = option(False, "of the denoiser")
    prompts: str = option("", "file of validation prompts (lines, or GenEval's jsonl)")
    eval_per_category: int = option(32, "validation prompts a category of the world")
    eval_steps: int = option(20, "sampling steps")
    eval_cfg: float = option(3.0, "guidance scale")
    eval_at_start: bool = option(True, "validate before the first step as well")


def attach(options: Options, model: TextToImage) -> Any:
    """New soft tokens on the pipeline's denoiser, in float32."""
    from agsm_loss.integrations.attach import attach_soft_tokens, backbone_of, make_soft_tokens
    from agsm_loss.integrations.unet_tokens import bos_embedding

    settings: dict[str, Any] = {
        "num_tokens": options.num_tokens,
        "num_layers": options.num_layers or None,
        "banks": options.banks,
        "time_buckets": options.time_buckets or None,
    }
    if backbone_of(model.denoiser).shared():  # UNets start from the empty prompt's BOS
        settings["init"] = bos_embedding(model.encode_prompts([""])["prompt_embeds"]).float().cpu()
    tokens = make_soft_tokens(model.denoiser, **settings).to(model.device)
    return attach_soft_tokens(model.denoiser, tokens)


def make_objective(options: Options, denoiser: Any, parameters: Any) -> Any:
    """The chosen objective over the (prepared) denoiser."""
    from agsm_loss import SoftREPALoss
    from objectives import AGSM, Denoising, SoftREPA

    if options.objective == "agsm":
        return AGSM(
            denoiser,
            pos_scale=options.pos_scale,
            neg_scale=options.neg_scale,
            temperature=options.temperature,
            entropy=options.entropy,
            ema_decay=options.ema_decay,
            chunk_size=options.chunk_size or None,
            parameters=parameters,
        )
    if options.objective == "softrepa":
        if options.banks != "shared":
            raise ValueError(
                f"banks: SoftREPA has one bank; expected shared, got {options.banks}. AGSM's ablation "
                "with two banks is --objective agsm."
            )
        loss = SoftREPALoss(
            logit_scale=options.logit_scale,
            temperature=options.logit_temperature,
            denoising_weight=options.denoising_weight,
        )
        return SoftREPA(denoiser, loss)
    return Denoising(denoiser)


def hard_per_image(options: Options) -> int:
    """How many of the other captions are edited ones."""
    share = {"in_batch": 0, "hard": options.num_negatives, "mixed": -(-options.num_negatives // 2)}
    return 0 if options.objective == "denoising" else share[options.negatives]


def prepare(
    options: Options, model: TextToImage, batch: Batch, generator: torch.Generator
) -> Inputs:
    """Noises a batch and chooses who competes; the draws are the generator's alone."""
    import torch

    from agsm_loss.candidates import caption_pool, mixed_candidates
    from agsm_loss.integrations.training import add_noise, regression_target
    from objectives import Inputs

    latents = model.encode_images(batch.pixels, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = model.timesteps(
        len(latents),
        options.timestep_density,
        generator,
        options.timestep_low,
        options.timestep_high,
    )
    hard = hard_per_image(options)
    candidates = mixed_candidates(
        batch.captions,
        batch.hard,
        num_negatives=options.num_negatives - hard,
        image_ids=batch.image_ids,
        generator=generator,
        allow_empty=True,
    )
    pool = [str(text) for text in caption_pool(batch.captions, batch.hard)]
    scheduler = model.pipe.scheduler
    return Inputs(
        add_noise(scheduler, latents, noise, timesteps),
        timesteps,
        regression_target(scheduler, latents, noise, timesteps),
        model.encode_prompts(pool),
        model.image_conditioning(batch.pixels),
        candidates,
    )


def validate(options: Options, model: TextToImage, step: int) -> dict[str, Any]:
    """Samples the validation prompts with psi+ and saves a sheet; the world's are scored."""
    from pathlib import Path

    from evaluate import summarize_with_intervals
    from generate import read_prompts, sample
    from world_eval import sheet, verdicts

    world = options.data == "world" and not options.prompts
    chosen = f"world:validation:{options.eval_per_category}" if world else options.prompts
    if not chosen:
        return {}
    rows = read_prompts(chosen)
    images = sample(
        model.pipe,
        [row["prompt"] for row in rows],
        seeds=range(len(rows)),
        steps=options.eval_steps,
        cfg=options.eval_cfg,
    )
    path = Path(options.output) / "sheets" / f"{step:06d}.png"
    judged = verdicts(images, rows) if world else None
    shown = [i for i in range(len(rows)) if not world or i % options.eval_per_category < 8]
    sheet(
        images[shown],
        [rows[i] for i in shown],
        None if judged is None else [judged[i] for i in shown],
        path,
    )
    return {} if judged is None else summarize_with_intervals(judged)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves the tokens."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss.integrations.pretrained import SavedTokens
    from agsm_loss.integrations.training import TokenDenoiser
    from captioned import open_batches
    from loop import Hooks, draws, start, train
    from text_to_image import TextToImage

    accelerator = start(options)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model = TextToImage.load(
        options.model, dtype[options.mixed_precision], device=accelerator.device
    )
    if options.lora_rank:
        model.add_lora(options.lora_rank)
    attached = attach(options, model)
    if options.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    if options.compile:
        model.denoiser.compile()
    module = TokenDenoiser(attached)
    parameters = [one for one in module.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
    )
    denoiser, optimizer = accelerator.prepare(module, optimizer)
    objective = make_objective(options, denoiser, parameters)
    batches = open_batches(
        options.data,
        options.batch_size,
        hard_per_image(options),
        seed=options.seed,
        size=options.resolution,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        image=options.image_column,
        text=options.caption_column,
        split=options.split,
    )

    def loss(batch: Batch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        inputs = prepare(options, model, batch, generator)
        with accelerator.autocast():
            return objective(inputs)

    def finish() -> None:
        saved = SavedTokens.of(attached, base_model=options.model, training=vars(options))
        saved.save_pretrained(Path(options.output) / "tokens")
        if options.lora_rank:
            model.denoiser.save_lora_adapter(Path(options.output) / "lora")

    train(
        options,
        accelerator,
        denoiser,
        optimizer,
        batches,
        Hooks(
            loss,
            lambda step: validate(options, model, step),
            finish,
            objective.after_step,
            (objective,),
            options.eval_at_start,
        ),
    )


if __name__ == "__main__":
    main()
