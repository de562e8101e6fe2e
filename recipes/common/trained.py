"""What a post-training recipe trains: soft tokens, a LoRA, or all of a pipeline's denoiser.

    student = Student.build(options, accelerator, task)
    pred = student.denoiser(noisy, timesteps, conditioning, bank)     # the prepared module
    student.validate(step); student.save()

Under `--output`: tokens/ (SavedTokens), lora/, or pipeline/ where all of the denoiser was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.options import RunOptions, TrainingOptions, option

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from agsm_loss import AGSMRegularizer, Candidates
    from agsm_loss.integrations.denoisers import TokenDenoiser
    from agsm_loss.integrations.hosts.step import AGSMBatch
    from common.images import Batch
    from common.pipeline import TextToImage
    from common.task import Task

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions(RunOptions):
    """Which pipeline, what of it is trained, and how that is validated."""

    model: str = option("recipes/models/flow", "pipeline folder or hub id")
    merge_lora: str = option("", "LoRA folder that is merged into the denoiser before training")
    num_tokens: int = option(4, "soft tokens a layer; 0 for none")
    banks: str = option("dual", "banks of soft tokens", ("dual", "shared", "positive_only"))
    num_layers: int = option(0, "layers with tokens of their own; 0: 5, or all of fewer; -1: all")
    time_buckets: int = option(100, "time tokens; 0 for none")
    lora_rank: int = option(0, "a LoRA on the denoiser's attention; 0 for none")
    full: bool = option(False, "train all of the denoiser")
    gradient_checkpointing: bool = option(False, "of the denoiser")
    prompts: str = option("", "file of validation prompts (lines, or GenEval's jsonl)")
    eval_per_category: int = option(32, "validation prompts a category of the world")
    eval_steps: int = option(20, "sampling steps")
    eval_cfg: float = option(3.0, "guidance scale")
    eval_at_start: bool = option(True, "validate before the first step as well")


@dataclass(frozen=True)
class AGSMOptions:
    """AGSM's own, and what it trains on."""

    pos_scale: float = option(1.0, "gamma+ of AGSM")
    neg_scale: float = option(0.1, "gamma- of AGSM")
    negatives_train: str = option(
        "tokens",
        "what the negative term trains where there is a LoRA too, or --full",
        ("tokens", "all"),
    )
    temperature: float = option(0.1, "T of AGSM's Plackett-Luce weights")
    entropy: float = option(0.0, "adapt T to this share of the weights' largest entropy; 0: fixed")
    ema_decay: float = option(0.9999, "of AGSM's EMA model")
    negatives: str = option("in_batch", "the other captions", ("in_batch", "hard", "mixed"))
    num_negatives: int = option(
        3, "other captions an image; mixed: half of them edited, rounded up"
    )
    chunk_size: int = option(0, "samples a forward pass of AGSM may hold; 0: all at once")
    data: str = option("world", "world, a parquet, jsonl or csv file, an imagefolder, or a hub id")
    split: str = option("train", "of the data set")
    caption_column: str = option("caption", "of the data set")
    resolution: int = option(512, "pixels a side to which the data set's images are brought")
    timestep_density: str = option("uniform", "of training", ("uniform", "logit_normal"))
    timestep_low: float = option(0.0, "share of the schedule (0: clean) where training begins")
    timestep_high: float = option(1.0, "share of the schedule (1: pure noise) where it ends")


@dataclass(frozen=True)
class PostTrainingOptions(ModelOptions, AGSMOptions):
    """Options of every recipe that trains on a pipeline and may have AGSM in it."""


@dataclass(frozen=True)
class StudentOptions(TrainingOptions, PostTrainingOptions):
    """The same of those on the shared loop."""


@dataclass(frozen=True)
class OnPolicyOptions(StudentOptions):
    """The same of hosts that sample for themselves; the data set gives the captions, and AGSM's images."""

    image_column: str = option("image", "of the data set")
    agsm_weight: float = option(0.0, "lambda: so much AGSM beside the host's loss; 0: the host")


@dataclass
class Student:
    """A pipeline in training.

    tokens: the denoiser with its soft tokens as accelerate has not wrapped it; None without tokens.
    denoiser: the module to call, `agsm_loss.Denoiser`; prepared by accelerate after `build`.
    parameters: what is trained.
    reference: makes a context in which the denoiser, with `Bank.OFF`, is the model as it was given.
    """

    options: PostTrainingOptions
    task: Task
    model: TextToImage
    tokens: TokenDenoiser | None
    denoiser: Any
    parameters: list[torch.nn.Parameter]
    reference: Callable[[], AbstractContextManager[Any]]
    optimizer: Any = None

    @classmethod
    def build(cls, options: StudentOptions, accelerator: Accelerator, task: Task) -> Student:
        """Loads the pipeline and prepares what the options train of it, with its optimizer."""
        import torch

        student = cls.load(options, accelerator.device, task)
        optimizer = torch.optim.AdamW(
            student.parameters,
            lr=options.lr,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
        )
        prepared = accelerator.prepare(student.denoiser, optimizer)
        student.denoiser, student.optimizer = prepared
        return student

    @classmethod
    def load(cls, options: PostTrainingOptions, device: torch.device, task: Task) -> Student:
        """Loads the pipeline, with the LoRA and the tokens that the options ask for."""
        import torch

        from agsm_loss import EMA
        from agsm_loss.integrations.denoisers import PlainDenoiser
        from agsm_loss.integrations.hosts.step import adapters_off
        from common.pipeline import TextToImage

        if options.full and options.lora_rank:
            raise ValueError("expected --full or --lora-rank, got both")
        if not (options.full or options.lora_rank or options.num_tokens):
            raise ValueError("nothing to train: expected --num-tokens, --lora-rank or --full")
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        held = torch.float32 if options.full else dtype[options.mixed_precision]
        model = TextToImage.load(options.model, held, device, task.pipeline_arguments)
        if options.merge_lora:
            model.merge_lora(options.merge_lora)
        if options.full:
            model.denoiser.requires_grad_(True)
        if options.lora_rank:
            model.add_lora(options.lora_rank)
        tokens = _attach(options, model) if options.num_tokens else None
        if options.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        if options.compile:
            model.denoiser.compile()
        module = PlainDenoiser(model.denoiser) if tokens is None else tokens
        parameters = [one for one in module.parameters() if one.requires_grad]
        if options.full:  # a frozen copy of what is trained
            reference: Any = EMA(parameters, decay=1.0).applied
        else:
            reference = partial(adapters_off, model.denoiser) if options.lora_rank else nullcontext
        return cls(options, task, model, tokens, module, parameters, reference)

    def agsm(
        self, batch_size: int, weight: float | Callable[[int], float] = 1.0
    ) -> AGSMRegularizer:
        """AGSM over the denoiser, as the options say, with λ = weight, on so many images a micro-step."""
        from agsm_loss import EMA, AdaptiveTemperature, AGSMLoss, AGSMRegularizer, InBatch, Passes

        options = self.options
        if batch_size < 2 and options.negatives == "in_batch":
            raise ValueError(
                f"batch_size: expected 2 at least of AGSM's images, got {batch_size}: with --negatives in_batch "
                "the other captions are the batch's, and there would be none. Take larger batches and "
                "fewer of them (--accumulate), or --negatives hard or mixed."
            )
        temperature: Any = options.temperature
        if options.entropy:
            temperature = AdaptiveTemperature(options.entropy)
        loss = AGSMLoss(
            pos_scale=options.pos_scale, neg_scale=options.neg_scale, temperature=temperature
        )
        return AGSMRegularizer(
            self.denoiser,
            EMA(self.parameters, decay=options.ema_decay),
            loss,
            weight=weight,
            candidates=InBatch(options.num_negatives, allow_empty=True),
            negatives_train=self._negatives_train(),
            passes=Passes(chunk_size=options.chunk_size or None),
        )

    def _negatives_train(self) -> list[torch.nn.Parameter] | None:
        """What the negatives' gradient reaches; None for the soft tokens."""
        options = self.options
        if not options.neg_scale or not (options.lora_rank or options.full):
            return None
        if self.tokens is None or options.negatives_train == "all":
            LOGGER.warning(
                "neg_scale: %g trains weights that all captions share towards this image for wrong "
                "captions too; take --neg-scale 0, or soft tokens and --negatives-train tokens.",
                options.neg_scale,
            )
            return self.parameters
        if options.gradient_checkpointing:
            raise ValueError(
                "negatives_train: tokens: expected no --gradient-checkpointing with --neg-scale above 0 and a "
                "LoRA or --full. Take --chunk-size, --neg-scale 0, or --negatives-train all."
            )
        return None

    def timesteps(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """(number,) as the options draw them."""
        options = self.options
        return self.model.timesteps(
            number,
            options.timestep_density,
            generator,
            options.timestep_low,
            options.timestep_high,
        )

    def agsm_batch(
        self, batch: Batch, latents: Tensor, generator: torch.Generator, kept: Tensor | None = None
    ) -> AGSMBatch:
        """What AGSM trains on beside an on-policy host, noised as the options say.

        latents: clean, of the batch's images or of the host's samples for its captions. kept: the rows
        that are trained on (all of them by default); the other rows' captions still compete.
        """
        import torch

        from agsm_loss import Candidates
        from agsm_loss.integrations.hosts.step import AGSMBatch

        in_batch = self.options.num_negatives - hard_per_image(self.options)
        pool, every = competitors(batch, in_batch, generator)
        kept = torch.arange(len(latents)) if kept is None else kept
        candidates = Candidates(
            every.index[kept], every.positives[kept], every.mask[kept], every.pool_size
        )
        latents = latents[kept.to(latents.device)]
        return AGSMBatch(
            latents,
            self.timesteps(len(latents), generator),
            torch.randn(latents.shape, generator=generator).to(latents),
            self.model.encode_prompts(pool),
            candidates,
            image_conditioning=self.model.image_conditioning(batch.pixels[kept]),
        )

    def validate(self, step: int) -> dict[str, Any]:
        """Samples the validation prompts with psi+ and saves a sheet; their scores, if there are any."""
        from common.sampling import sample
        from common.sheet import sheet

        options, task = self.options, self.task
        rows = task.validation()
        if not rows:
            return {}
        images = sample(
            self.model.pipe,
            [row["prompt"] for row in rows],
            seeds=range(len(rows)),
            steps=options.eval_steps,
            cfg=options.eval_cfg,
            arguments=self.model.arguments,
        )
        judged = task.judge(images, rows)
        shown = task.shown(rows)
        sheet(
            images[shown],
            [rows[i] for i in shown],
            None if judged is None else [judged[i] for i in shown],
            Path(options.output) / "sheets" / f"{step:06d}.png",
        )
        return {} if judged is None else task.summarize(judged)

    def train(
        self, accelerator: Accelerator, batches: Any, loss: Callable[..., Any], step: Any
    ) -> None:
        """Runs the shared loop (`loop.train`), with this student's validation and saving.

        step: the host or objective, whose `update_ema` follows each optimizer step and whose state a
        checkpoint holds.
        """
        from common.loop import Hooks, train

        options = self.options
        assert isinstance(options, StudentOptions)
        train(
            options,
            accelerator,
            self.denoiser,
            self.optimizer,
            batches,
            Hooks(
                loss,
                self.validate,
                self.save,
                step.update_ema,
                (step,),
                options.eval_at_start,
            ),
        )

    def save(self) -> None:
        """What was trained, under `options.output`."""
        import torch

        output = Path(self.options.output)
        if self.tokens is not None:
            self.tokens.save_pretrained(
                output / "tokens", base_model=self.options.model, training=vars(self.options)
            )
        if self.options.lora_rank:
            self.model.denoiser.save_lora_adapter(output / "lora")
        if self.options.full:
            self.model.denoiser.to(memory_format=torch.contiguous_format)  # as safetensors wants it
            self.model.pipe.save_pretrained(output / "pipeline")


def on_policy_images(options: OnPolicyOptions, task: Task, batch_size: int | None = None) -> Any:
    """The captions that are sampled, with AGSM's images and, where it is on, its edited captions."""
    hard = hard_per_image(options) if options.agsm_weight else 0
    return task.images(batch_size or options.batch_size, hard, options.image_column)


def competitors(
    batch: Any, in_batch: int, generator: torch.Generator
) -> tuple[list[str], Candidates]:
    """The captions that a batch's images are shown, and who competes for each.

    batch: `images.Batch` or `pairs.PairBatch`. in_batch: negatives an image from the batch, beside
    its edited captions.
    """
    from agsm_loss import Mixed, caption_pool

    candidates = Mixed(in_batch, allow_empty=True)(
        batch.captions,
        hard_negatives=batch.hard,
        image_ids=batch.image_ids,
        generator=generator,
    )
    return [str(text) for text in caption_pool(batch.captions, batch.hard)], candidates


def hard_per_image(options: AGSMOptions) -> int:
    """How many of an image's other captions are edited ones."""
    number = options.num_negatives
    return {"in_batch": 0, "hard": number, "mixed": -(-number // 2)}[options.negatives]


def _attach(options: ModelOptions, model: TextToImage) -> TokenDenoiser:
    """The pipeline's denoiser with new soft tokens, in float32."""
    from agsm_loss.integrations.denoisers import TokenDenoiser
    from agsm_loss.integrations.tokens.attach import backbone_of
    from agsm_loss.integrations.tokens.unet import bos_embedding

    settings: dict[str, Any] = {
        "num_tokens": options.num_tokens,
        "num_layers": options.num_layers or None,
        "banks": options.banks,
        "time_buckets": options.time_buckets or None,
    }
    if backbone_of(model.denoiser).one_set():  # UNets start from the empty prompt's BOS vector
        settings["init"] = bos_embedding(model.encode_prompts([""])["prompt_embeds"])
    return TokenDenoiser(model.denoiser, **settings)
