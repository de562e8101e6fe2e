"""What a post-training recipe trains: soft tokens, a LoRA, or all of a pipeline's denoiser.

    trained = TrainedPipeline.build(options, accelerator, task)
    pred = trained.denoiser(noisy, timesteps, conditioning, bank)     # the prepared module
    trained.validate(step); trained.save()

Under `--output_dir`: tokens/ (SavedTokens), lora/, or pipeline/ where all of the denoiser was
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from agsm_loss import EMA, AGSMRegularizer, Candidates
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.base import AGSMBatch, adapters_off
from agsm_loss.integrations.tokens.attach import backbone_of
from agsm_loss.integrations.tokens.unet import bos_embedding
from data.image_data import Batch
from data.sheet import sheet
from data.sources import check_source
from data.task import Task
from model.agsm import competitors, make_agsm
from model.pipeline import TextToImage
from model.sampling import sample
from model.saving import save
from model.summary import FirstStep, say_start, steps_line
from rewards.rewards import check as check_rewards
from run.engines import blocks_of, is_sharded, run_inside
from run.loop import Hooks, train
from run.messages import say_scores, say_validating
from run.settings import ModelOptions, PipelineLoopOptions, PipelineOptions, RewardOptions


@dataclass
class TrainedPipeline:
    """A pipeline in training.

    tokens: the denoiser with its soft tokens as accelerate has not wrapped it; None without tokens.
    denoiser: the module to call, `agsm_loss.Denoiser`; prepared by accelerate after `build`.
    parameters: what is trained, as the engine holds it.
    reference: makes a context in which the denoiser, with `Bank.OFF`, is the model as it was given.
    has_agsm: whether `agsm` has been called.
    """

    options: PipelineOptions
    task: Task
    model: TextToImage
    tokens: TokenDenoiser | None
    denoiser: Any
    parameters: list[torch.nn.Parameter]
    reference: Callable[[], AbstractContextManager[Any]]
    optimizer: Any = None
    has_agsm: bool = False

    @classmethod
    def build(
        cls, options: PipelineLoopOptions, accelerator: Accelerator, task: Task
    ) -> TrainedPipeline:
        """Loads the pipeline and prepares what the options train of it, with its optimizer."""
        trained = cls.load(options, accelerator, task)
        optimizer = torch.optim.AdamW(
            trained.parameters,
            lr=options.learning_rate,
            betas=(0.9, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
        )
        module = blocks_of(trained.denoiser, trained.model.denoiser)
        trained.denoiser, trained.optimizer = accelerator.prepare(module, optimizer)
        # FSDP2 has put its shards in their place.
        trained.parameters = [one for one in trained.denoiser.parameters() if one.requires_grad]
        if options.full:  # a frozen copy of what is trained
            trained.reference = EMA(trained.denoiser, decay=1.0).applied
        return trained

    @classmethod
    def load(
        cls, options: PipelineOptions, state: Accelerator | PartialState, task: Task
    ) -> TrainedPipeline:
        """Loads the pipeline, with the LoRA and the tokens that the options ask for."""
        if options.full and options.rank:
            raise ValueError("expected --full or --rank, got both")
        if not (options.full or options.rank or options.num_tokens):
            raise ValueError("nothing to train: expected --num_tokens, --rank or --full")
        check_source("merge_lora", options.merge_lora)
        if isinstance(options, RewardOptions):
            check_rewards(options.reward)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        casts = state.distributed_type == DistributedType.DEEPSPEED  # all of the denoiser
        held = torch.float32 if options.full and not casts else dtype[options.mixed_precision]
        model = TextToImage.load(options.model, held, state.device)
        if is_sharded(state):  # FSDP2 takes no channels_last
            model.denoiser.to(memory_format=torch.contiguous_format)
        if options.merge_lora:
            model.merge_lora(options.merge_lora)
        if options.full:
            model.denoiser.requires_grad_(True)
        if options.rank:
            model.add_lora(options.rank)
        tokens = _attach(options, model) if options.num_tokens else None
        if options.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        if options.compile:
            model.denoiser.compile()
        module = PlainDenoiser(model.denoiser) if tokens is None else tokens
        parameters = [one for one in module.parameters() if one.requires_grad]
        reference: Any = partial(adapters_off, model.denoiser) if options.rank else nullcontext
        return cls(options, task, model, tokens, module, parameters, reference)

    def agsm(
        self, batch_size: int, weight: float | Callable[[int], float] = 1.0
    ) -> AGSMRegularizer:
        """AGSM over the denoiser, with λ = weight, on so many images a micro-step."""
        self.has_agsm = True
        return make_agsm(
            self.options,
            self.denoiser,
            batch_size,
            weight,
            self.parameters,
            self.tokens is not None,
        )

    def timesteps(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """(number,) as the options draw them."""
        options = self.options
        return self.model.timesteps(
            number,
            options.timestep_density,
            generator,
            options.timestep_low,
        )

    def agsm_batch(
        self, batch: Batch, latents: Tensor, generator: torch.Generator, kept: Tensor | None = None
    ) -> AGSMBatch:
        """What AGSM trains on in an on-policy host, noised as the options say.

        latents: clean, of the batch's images or of the host's samples for its captions.
        kept: the rows that are trained on (all of them by default); the other rows' captions still
        compete.
        """
        pool, every = competitors(self.options, batch, generator)
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
        """Samples the validation prompts with ψ⁺, saves a sheet; their scores, if there are any."""
        options, task = self.options, self.task
        rows = task.validation()
        if not rows:
            return {}
        is_main = PartialState().is_main_process
        if is_main:
            say_validating(len(rows), options.validation_inference_steps)
        with self.model.loaded():
            images = run_inside(
                self.denoiser,
                lambda: sample(
                    self.model.pipe,
                    [row["prompt"] for row in rows],
                    seeds=range(len(rows)),
                    num_inference_steps=options.validation_inference_steps,
                    guidance_scale=options.validation_guidance_scale,
                    arguments=self.model.arguments,
                ),
            )
        if not is_main:  # it has helped with its shard of the weights
            return {}
        judged = task.judge(images, rows)
        shown = task.shown(rows)
        file = Path(options.output_dir) / "sheets" / f"{step:06d}.png"
        sheet(
            images[shown],
            [rows[i] for i in shown],
            None if judged is None else [judged[i] for i in shown],
            file,
        )
        scores = {} if judged is None else task.summarize(judged)
        say_scores(step, scores, file)
        return scores

    def train(
        self,
        accelerator: Accelerator,
        batches: Any,
        loss: Callable[..., Any],
        step: Any,
        fill: Callable[..., None] | None = None,
    ) -> None:
        """Runs the shared loop (`loop.train`), with this pipeline's validation and saving.

        step: the host or objective; its `update_ema` follows each optimizer step, and a checkpoint
        holds its state. fill: of `precompute.precompute`.
        """
        options = self.options
        assert isinstance(options, PipelineLoopOptions)
        first: list[FirstStep] = []

        def counted(batch: Any, index: int) -> Any:
            if not first and accelerator.is_main_process:
                first.append(FirstStep(self.denoiser))
            return loss(batch, index)

        def update_ema() -> None:
            step.update_ema()
            for one in first:
                one.tell()

        def begin(done: int) -> None:
            rows = batches.about() if hasattr(batches, "about") else options.data
            about = steps_line(options, done, accelerator.num_processes, rows)
            self.say_start(about, f"{options.validation_steps:,} steps")

        train(
            options,
            accelerator,
            self.denoiser,
            self.optimizer,
            batches,
            Hooks(
                counted,
                self.validate,
                self.save,
                update_ema,
                (step,),
                not options.skip_first_validation,
                precompute=fill,
                begin=begin,
            ),
        )

    @property
    def number(self) -> int:
        """Of trained parameters, on all processes together."""
        return sum(getattr(one, "ds_numel", one.numel()) for one in self.parameters)

    def say_start(self, about: Mapping[str, str], every: str) -> None:
        """Prints what is trained, where, and where it goes to; on the main process.

        about: of its data and steps. every: what lies between two validations.
        """
        if PartialState().is_main_process:
            say_start(self, about, every)

    def save(self) -> None:
        """What was trained, under `options.output_dir`, with cards and the next command."""
        save(self)


def _attach(options: ModelOptions, model: TextToImage) -> TokenDenoiser:
    """The pipeline's denoiser with new soft tokens, in float32."""
    settings: dict[str, Any] = {
        "num_tokens": options.num_tokens,
        "num_layers": options.num_layers,
        "banks": options.banks,
    }
    if backbone_of(model.denoiser).one_set():  # UNets start from the empty prompt's BOS vector
        settings["init"] = bos_embedding(model.encode_text([""])["prompt_embeds"])
    return TokenDenoiser(model.denoiser, **settings)
