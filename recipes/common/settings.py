"""The options that recipes share, by section: model, data, AGSM, training, validation.

A recipe's own options are a dataclass of those that it needs, with its own before them:

    class Options(PipelineLoopOptions): ...      # a pipeline, trained by the shared loop
    class Options(PipelineOptions): ...          # a pipeline, trained by somebody else's
    class Options(LoopOptions): ...              # the shared loop alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.options import Checked, option


@dataclass(frozen=True)
class ModelOptions(Checked):
    """Which pipeline, and what of it is trained."""

    SECTION = "model"
    model: str = option("recipes/models/flow", "Pipeline to train: a folder or a hub id.")
    merge_lora: str = option("", "Folder of a LoRA to merge into the denoiser before training.")
    num_tokens: int = option(4, "Soft tokens to train in each layer; 0 trains none.", at_least=0)
    banks: Literal["dual", "shared", "positive_only"] = option(
        "dual",
        "Banks of soft tokens: one for matching captions and one for wrong ones (dual), one for "
        "both (shared), or one for matching captions alone (positive_only).",
    )
    num_layers: int = option(
        0, "Layers with soft tokens; 0 takes 5 (all, where there are fewer), -1 all.", at_least=-1
    )
    time_buckets: int = option(
        100, "Intervals of the timesteps with a time token each; 0 has no time tokens.", at_least=0
    )
    rank: int = option(
        0, "Rank of a LoRA to train on the denoiser's attention; 0 trains none.", at_least=0
    )
    full: bool = option(False, "Train all of the denoiser's weights.")
    gradient_checkpointing: bool = option(
        False, "Recompute the denoiser's activations backwards: less memory, more time."
    )


@dataclass(frozen=True)
class DataOptions(Checked):
    """What is trained on."""

    SECTION = "data"
    data: str = option(
        "world",
        "Data to train on: world (the embedded one, rendered), a parquet, jsonl or csv file, an "
        "image folder, or a hub id.",
    )
    split: str = option("train", "Split of the data set to train on.")
    caption_column: str = option("caption", "Column of the data set with the captions.")
    resolution: int = option(
        512, "Pixels a side to which the data set's images are resized and cropped.", at_least=1
    )


@dataclass(frozen=True)
class ImageOptions(Checked):
    """Data of one image a row (preference pairs have two)."""

    SECTION = "data"
    image_column: str = option("image", "Column of the data set with the images.")


@dataclass(frozen=True)
class AGSMOptions(Checked):
    """The loss."""

    SECTION = "AGSM"
    pos_scale: float = option(
        1.0,
        "gamma+: guidance in the target of the matching caption; 0 is plain denoising.",
        at_least=0,
    )
    neg_scale: float | None = option(
        None,
        "gamma-: guidance in the targets of the wrong captions; 0 does not train on them. Left "
        "out, it is 0.1 where soft tokens alone are trained, and 0 with a LoRA or --full.",
        at_least=0,
    )
    negatives_train: Literal["tokens", "all"] = option(
        "tokens",
        "What the wrong captions train where there is a LoRA or --full: the soft tokens alone, or "
        "all.",
    )
    temperature: float = option(
        0.1, "T of the Plackett-Luce weights; a large one makes them equal.", above=0
    )
    entropy: float = option(
        0.0,
        "Share of the weights' largest entropy to which T is adapted; 0 keeps T fixed.",
        at_least=0,
        below=1,
    )
    ema_decay: float = option(
        0.9999, "Share of the EMA model that an optimizer step keeps.", at_least=0, at_most=1
    )
    candidates: Literal["in_batch", "hard", "mixed"] = option(
        "in_batch",
        "Where wrong captions come from: the batch (in_batch), edits of the image's own caption "
        "(hard), or both (mixed: half are edits, rounded up).",
    )
    num_negatives: int = option(3, "Wrong captions an image.", at_least=1)
    train_negatives: int = option(
        0, "Wrong captions an image and step to train on, drawn at random; 0 takes all.", at_least=0
    )
    chunk_size: int = option(
        0,
        "Samples a forward pass of AGSM; 0 takes all at once. Few need little memory.",
        at_least=0,
    )


@dataclass(frozen=True)
class TrainingOptions(Checked):
    """What every recipe that trains has, whoever's loop it runs in."""

    SECTION = "training"
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    gradient_accumulation_steps: int = option(
        1, "Micro-steps whose gradients an optimizer step averages.", at_least=1
    )
    adam_beta2: float = option(0.999, "AdamW's second beta.", at_least=0, below=1)
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.", at_least=0)
    max_grad_norm: float = option(
        1.0, "Norm to which gradients are clipped; 0 does not clip.", at_least=0
    )
    seed: int = option(0, "Seed of weights, data and noise.", at_least=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Precision of the forward passes."
    )
    compile: bool = option(False, "Compile the denoiser by torch.compile.")
    output_dir: str = option(
        "runs/train", "Folder for the log, sheets, checkpoints and what was trained."
    )
    resume_from_checkpoint: Literal["latest"] | None = option(
        None, "Continue from the latest checkpoint under output_dir, if there is one."
    )
    report_to: str = option(
        "",
        "Tracker to log to as well as log.jsonl: tensorboard, wandb, trackio or another of "
        "accelerate's.",
    )


@dataclass(frozen=True)
class LoopOptions(TrainingOptions):
    """What every recipe on the shared loop has (`loop.train`)."""

    SECTION = "training"
    max_train_steps: int = option(1000, "Optimizer steps to run.", at_least=1)
    train_batch_size: int = option(16, "Images a process and micro-step.", at_least=1)
    dataloader_num_workers: int = option(
        0,
        "Processes that prepare batches ahead; 0 prepares them in the training process.",
        at_least=0,
    )
    logging_steps: int = option(50, "Optimizer steps between two lines of the log.", at_least=1)
    validation_steps: int = option(1000, "Optimizer steps between two validations.", at_least=1)
    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.", at_least=1)
    lr_warmup_steps: int = option(
        0, "Optimizer steps over which the learning rate rises to its peak.", at_least=0
    )
    lr_decay_steps: int = option(
        0, "Last optimizer steps, over which the learning rate falls to 0 linearly.", at_least=0
    )


@dataclass(frozen=True)
class NoiseOptions(Checked):
    """Where in the schedule a recipe trains."""

    SECTION = "training"
    timestep_density: Literal["uniform", "logit_normal"] = option(
        "uniform", "Distribution of the timesteps; logit_normal is for flow models."
    )
    timestep_low: float = option(
        0.0, "Least timestep, as a share of the schedule: 0 is clean.", at_least=0, at_most=1
    )
    timestep_high: float = option(
        1.0, "Largest timestep, as a share of the schedule: 1 is pure noise.", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class WorldValidationOptions(Checked):
    """How a model is sampled and scored on the world's validation prompts."""

    SECTION = "validation"
    validation_per_category: int = option(
        32, "Validation prompts a category of the world.", at_least=1
    )
    validation_inference_steps: int = option(
        20, "Sampling steps of a validation image.", at_least=1
    )
    validation_guidance_scale: float = option(
        3.0, "Classifier-free guidance scale of a validation image; 1 has none.", at_least=0
    )
    validate_first: bool = option(True, "Validate before the first step as well.")


@dataclass(frozen=True)
class ValidationOptions(WorldValidationOptions):
    """The same, or on prompts of a file."""

    SECTION = "validation"
    validation_prompts: str = option(
        "", "File of validation prompts (lines, or GenEval's jsonl) in place of the world's."
    )


@dataclass(frozen=True)
class PipelineOptions(
    ModelOptions, DataOptions, AGSMOptions, TrainingOptions, NoiseOptions, ValidationOptions
):
    """Options of every recipe that trains on a pipeline and may have AGSM in it."""


@dataclass(frozen=True)
class PipelineLoopOptions(PipelineOptions, LoopOptions):
    """The same of those on the shared loop."""


@dataclass(frozen=True)
class HostOptions(Checked):
    """Options of the recipes whose objective is another method's; they come with its own."""

    agsm_weight: float = option(
        0.0, "lambda: weight of AGSM in the loss; 0 trains the host alone.", at_least=0
    )


@dataclass(frozen=True)
class PreferenceOptions(HostOptions, PipelineLoopOptions):
    """Options of the recipes on preference pairs."""

    beta: float = option(
        5000.0, "beta of the preference loss: a larger one stays closer to the reference.", above=0
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = option(
        "sigmoid", "Form of the preference loss."
    )
    agsm_warmup_steps: int = option(
        0, "Optimizer steps over which lambda rises from 0.", at_least=0
    )


@dataclass(frozen=True)
class OnPolicyOptions(HostOptions, PipelineLoopOptions, ImageOptions):
    """Options of hosts that sample for themselves, by the data set's captions."""


def neg_scale_of(options: PipelineOptions) -> float:
    """gamma-: as given, or 0.1 where soft tokens alone are trained and 0 otherwise."""
    if options.neg_scale is not None:
        return options.neg_scale
    return 0.0 if options.rank or options.full else 0.1


def hard_per_image(options: AGSMOptions) -> int:
    """How many of an image's wrong captions are edits of its own."""
    number = options.num_negatives
    return {"in_batch": 0, "hard": number, "mixed": -(-number // 2)}[options.candidates]
