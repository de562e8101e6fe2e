"""The options that recipes share, by section: model, data, AGSM, training, validation.

A recipe's own options are a dataclass of those that it needs, with its own before them:

    class Options(PipelineLoopOptions): ...      # a pipeline, trained by the shared loop
    class Options(PipelineOptions): ...          # a pipeline, trained by somebody else's
    class Options(LoopOptions): ...              # the shared loop alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from run.options import Checked, option


@dataclass(frozen=True)
class ModelOptions(Checked):
    """Which pipeline, and what of it is trained."""

    SECTION = "model"
    WORLD_MODEL = "recipes/lab/models/flow"
    model: str = option(
        "",
        "Pipeline to train: a folder or a hub id. Left out, with --data world alone: a model of "
        "the embedded world.",
    )
    merge_lora: str = option(
        "", "LoRA to merge into the denoiser before training: a folder or a hub id."
    )
    num_tokens: int = option(4, "Soft tokens to train per layer; 0: none.", at_least=0)
    banks: Literal["dual", "shared", "positive_only"] = option(
        "dual",
        "Banks of soft tokens: one for matching captions and one for negatives (dual), one for "
        "both (shared, which SoftREPA needs), or one for matching captions alone (positive_only). "
        "For AGSM, all but dual are ablations.",
    )
    num_layers: int | None = option(
        None,
        "First layers that get tokens; left out: 5, or all where there are fewer. Not for SD1.5 "
        "and SDXL.",
        at_least=1,
    )
    rank: int = option(
        0, "Rank of a LoRA to train on the denoiser's attention; 0: no LoRA.", at_least=0
    )
    full: bool = option(False, "Train all of the denoiser's weights.")
    gradient_checkpointing: bool = option(
        False,
        "Recompute the denoiser's activations in the backward pass: less memory, more time.",
    )


@dataclass(frozen=True)
class DataOptions(Checked):
    """What is trained on."""

    SECTION = "data"
    data: str = option(
        "world",
        "Captioned images to train on: world (the embedded one, rendered), a parquet, jsonl, csv "
        "or webdataset tar file, a pattern of several, a folder of images, or a hub id.",
    )
    split: str = option("train", "Split of the data set to train on (not for --data world).")
    caption_column: str = option("caption", "Column of the captions (not for --data world).")
    resolution: int = option(
        512,
        "Side in pixels to which images are resized and cropped (not for --data world).",
        at_least=1,
    )


@dataclass(frozen=True)
class ImageOptions(Checked):
    """Data of one image per row (preference pairs have two)."""

    SECTION = "data"
    image_column: str = option("image", "Column of the images (not for --data world).")


@dataclass(frozen=True)
class PrecomputeOptions(Checked):
    """Of the recipes whose images and captions are all known before the first step."""

    SECTION = "data"
    precompute: str = option(
        "",
        "Folder in which latents and text embeddings are kept, made before the first step; the VAE "
        "and the text encoders are then off the accelerator. Runs can share it. Empty: everything "
        "is encoded in each step.",
    )


@dataclass(frozen=True)
class AGSMOptions(Checked):
    """The loss. A negative is a caption that does not match the image."""

    SECTION = "AGSM"
    pos_scale: float = option(
        1.0,
        "gamma+: how far the matching caption's target is moved away from the others; 0 with "
        "--neg_scale 0 is plain denoising.",
        at_least=0,
    )
    neg_scale: float | None = option(
        None,
        "gamma-: how far the negatives' targets are moved; 0: negatives are not trained. Left out: "
        "0.1 where soft tokens alone are trained, 0 with a LoRA or --full.",
        at_least=0,
    )
    negative_gradient: Literal["tokens", "all"] = option(
        "tokens",
        "What the negatives' gradient reaches where there is a LoRA or --full: the soft tokens "
        "alone, or all that is trained.",
    )
    temperature: float = option(
        0.1,
        "Temperature of the captions' weights; larger makes them more equal. Not used with "
        "--target_entropy.",
        above=0,
    )
    target_entropy: float = option(
        0.0,
        "Adapt the temperature so that the weights' entropy is this share of its maximum (0.7 in "
        "our studies); 0: use --temperature.",
        at_least=0,
        below=1,
    )
    ema_decay: float = option(
        0.9999,
        "Decay of the EMA per optimizer step (0.98 in our short runs).",
        at_least=0,
        at_most=1,
    )
    candidates: Literal["in_batch", "hard", "mixed"] = option(
        "in_batch",
        "Where negatives (captions that do not match the image) come from: the batch's other "
        "captions (in_batch), edits of the image's own caption (hard), or both (mixed: half are "
        "edits, rounded up).",
    )
    num_negatives: int = option(
        3, "Negatives per image; 0: the empty caption alone, with --null_caption.", at_least=0
    )
    null_caption: bool = option(
        False,
        "The empty caption competes too, besides --num_negatives: what classifier-free guidance "
        "does in the sampler is trained in.",
    )
    negatives_per_step: int = option(
        0,
        "Negatives per image to train on in a step, drawn at random; 0: all.",
        at_least=0,
    )
    chunk_size: int = option(
        0,
        "Samples per forward pass of AGSM; 0: all at once. Smaller uses less memory and more time.",
        at_least=0,
    )


@dataclass(frozen=True)
class TrainingOptions(Checked):
    """What every recipe that trains has, whoever's loop it runs in."""

    SECTION = "training"
    learning_rate: float = option(1e-3, "Peak learning rate.", above=0)
    gradient_accumulation_steps: int = option(
        1, "Micro-steps per optimizer step; their gradients are averaged.", at_least=1
    )
    adam_beta2: float = option(0.999, "AdamW's second beta.", at_least=0, below=1)
    adam_weight_decay: float = option(1e-4, "AdamW's weight decay.", at_least=0)
    max_grad_norm: float = option(
        1.0, "Norm to which gradients are clipped; 0: no clipping.", at_least=0
    )
    seed: int = option(0, "Seed of weights, data and noise.", at_least=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Precision of the forward passes."
    )
    compile: bool = option(False, "Compile the denoiser with torch.compile.")
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
    train_batch_size: int = option(16, "Images per process and micro-step.", at_least=1)
    dataloader_num_workers: int = option(
        0,
        "Processes that prepare batches ahead; 0: the training process prepares them.",
        at_least=0,
    )
    logging_steps: int = option(50, "Optimizer steps between two lines of the log.", at_least=1)
    validation_steps: int = option(1000, "Optimizer steps between two validations.", at_least=1)
    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.", at_least=1)
    lr_warmup_steps: int = option(
        0, "Number of first steps in which the learning rate rises to its peak.", at_least=0
    )
    lr_decay_steps: int = option(
        0,
        "Number of final steps in which the learning rate falls linearly to 0.",
        at_least=0,
    )


@dataclass(frozen=True)
class NoiseOptions(Checked):
    """Where in the schedule a recipe trains."""

    SECTION = "training"
    timestep_density: Literal["uniform", "logit_normal"] = option(
        "uniform", "Distribution of the timesteps; logit_normal is for flow models."
    )
    timestep_low: float = option(
        0.0,
        "Smallest timestep to train at, as a share of the schedule; 0: no noise.",
        at_least=0,
        below=1,
    )


@dataclass(frozen=True)
class WorldValidationOptions(Checked):
    """How a model is sampled and scored on the world's validation prompts."""

    SECTION = "validation"
    validation_per_category: int = option(32, "Validation prompts per category.", at_least=1)
    validation_inference_steps: int = option(20, "Sampling steps per validation image.", at_least=1)
    validation_guidance_scale: float = option(
        3.0, "Classifier-free guidance scale of validation images; 1: no guidance.", at_least=0
    )
    skip_first_validation: bool = option(False, "Do not validate before the first step.")


@dataclass(frozen=True)
class ValidationOptions(WorldValidationOptions):
    """The same, or on prompts of a file."""

    SECTION = "validation"
    validation_per_category: int = option(
        32, "Validation prompts per category (only for --data world).", at_least=1
    )
    validation_prompts: str = option(
        "",
        "File of validation prompts, one per line or GenEval's jsonl; with --data world in place "
        "of the world's.",
    )


@dataclass(frozen=True)
class PipelineOptions(
    ModelOptions, DataOptions, AGSMOptions, TrainingOptions, NoiseOptions, ValidationOptions
):
    """Options of every recipe that trains on a pipeline and may have AGSM in it.

    A `model` and a `neg_scale` that are left out are chosen here.
    """

    @property
    def method(self) -> str:
        """What trains, in words."""
        return self.TITLE

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", given_model(self.model, self.data, self.WORLD_MODEL))
        if not (self.num_negatives or self.null_caption):
            raise ValueError(
                "num_negatives: expected at least 1 without --null_caption, got 0: nothing would "
                "compete with the image's own caption."
            )
        if self.neg_scale is None:
            chosen = 0.0 if self.rank or self.full else 0.1
            object.__setattr__(self, "neg_scale", chosen)


@dataclass(frozen=True)
class PipelineLoopOptions(PipelineOptions, LoopOptions):
    """The same of those on the shared loop."""


@dataclass(frozen=True)
class HostOptions(Checked):
    """Options of the recipes whose objective is another method's; they come with its own."""

    agsm_weight: float = option(
        0.0, "lambda: weight of AGSM in the loss; 0: {title} alone.", at_least=0
    )
    agsm_warmup_steps: int = option(
        0, "Number of first steps in which lambda rises from 0.", at_least=0
    )

    @property
    def method(self) -> str:
        """The host, and AGSM where it is on."""
        own = f" with AGSM (lambda {self.agsm_weight:g})" if self.agsm_weight else ""
        return f"{self.TITLE}{own}"


@dataclass(frozen=True)
class RewardOptions(HostOptions):
    """Options of the recipes in which the model's own samples are scored."""

    reward: str = option(
        "detector",
        "What scores the samples, larger is better: detector (for --data world), "
        "jpeg_compressibility, jpeg_incompressibility, redness, pickscore, clipscore, hpsv2, "
        "imagereward, ocr, geneval; a CLIP model like PickScore, as a folder or a hub id; or "
        "package.module:function, which is called with pixels (N, 3, H, W) in [-1, 1] and N "
        "prompts and returns (N,). Several are added, each times its weight: "
        "pickscore:0.5,redness:1.",
    )
    agsm_images: Literal["data", "best"] = option(
        "data", "Images that AGSM trains on: the data set's, or the samples with the best rewards."
    )
    agsm_best: float = option(
        0.25,
        "Share of the samples that AGSM trains on, best reward first (for --agsm_images best).",
        above=0,
        at_most=1,
    )
    agsm_batch: int = option(8, "Images of AGSM per process and micro-step.", at_least=2)


@dataclass(frozen=True)
class PromptOptions(Checked):
    """Options of the recipes that sample prompts of their own."""

    sampling_prompts: str = option(
        "",
        "File of prompts to sample, one per line or GenEval's jsonl, in place of the data set's "
        "captions.",
    )


@dataclass(frozen=True)
class PreferenceOptions(HostOptions, PipelineLoopOptions, PrecomputeOptions):
    """Options of the recipes on preference pairs."""

    beta: float = option(
        5000.0,
        "beta of {title}: scale of the difference to the reference in the loss. Larger: stronger "
        "gradients at first, and a model that stays closer to the reference.",
        above=0,
    )
    data: str = option(
        "world",
        "Preference pairs to train on: world (the embedded one, rendered), or a table as a file, a "
        "folder or a hub id, with the columns jpg_0, jpg_1, label_0 and caption (Pick-a-Pic's), or "
        "image_w (the preferred one), image_l and caption.",
    )
    train_batch_size: int = option(16, "Pairs per process and micro-step.", at_least=1)


@dataclass(frozen=True)
class OnPolicyOptions(RewardOptions, PipelineLoopOptions, ImageOptions):
    """Options of hosts that sample for themselves, by the data set's captions."""

    train_batch_size: int = option(16, "Captions to sample per process and micro-step.", at_least=1)


@dataclass(frozen=True)
class GroupOptions(PromptOptions, OnPolicyOptions):
    """Options of the hosts that compare the rewards of a prompt's samples."""

    group_size: int = option(
        4, "Images per prompt, whose rewards are compared with each other.", at_least=2
    )
    num_inference_steps: int = option(10, "Sampling steps per image.", at_least=2)
    kl_weight: float = option(
        0.0,
        "Weight of the KL divergence to the reference (the model as it was given); 0: none.",
        at_least=0,
    )


def given_model(model: str, data: str, of_world: str) -> str:
    """The model; where none is given and the data are the world's, the world's.

    Raises:
        ValueError: none is given for other data.
    """
    if model or data == "world":
        return model or of_world
    raise ValueError(
        f"model: expected a pipeline for the data {data}, a folder or a hub id, got none. Give "
        f"--model: only the embedded world's data have one of their own, {of_world}."
    )


def hard_per_image(options: AGSMOptions) -> int:
    """How many of an image's negatives are edits of its own caption."""
    number = options.num_negatives
    return {"in_batch": 0, "hard": number, "mixed": -(-number // 2)}[options.candidates]
