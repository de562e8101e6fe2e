"""What a recipe trains of a pipeline: soft tokens, a LoRA, or all of its denoiser.

model = TrainedModel(options, accelerator, task).prepare(accelerator)
pred = model.denoiser(noisy, timesteps, conditioning, bank)     # the prepared module
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from agsm_loss import EMA, AGSMRegularizer, Candidates, caption_pool
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.base import AGSMBatch, adapters_off
from agsm_loss.integrations.noise import prediction_type
from agsm_loss.integrations.prompts import caption_ids
from agsm_loss.integrations.tokens.attach import backbone_of
from agsm_loss.integrations.tokens.unet import bos_embedding
from data.batches import Batch, PairBatch
from data.sources import check_source, found_here, given_model, is_world
from data.task import Task
from model.agsm import Competitors, agsm_weight, make_agsm, resolve_agsm
from model.pipeline import TextToImage
from model.sampling import default_guidance_scale
from run.checkpoints import digest_of, fingerprint_of
from run.engines import blocks_of, is_sharded
from run.options import option

if TYPE_CHECKING:
    from typing import Self  # Python 3.11's


@dataclass(frozen=True)
class ModelOptions:
    """Which pipeline, and what of it is trained."""

    _argument_group_name = "model"
    model: str = option(
        "",
        "Pipeline to train: a folder or a hub id. Left out, with --data world alone: a model of "
        "the embedded world.",
    )
    merge_lora: str = option(
        "", "LoRA to merge into the denoiser before training: a folder or a hub id."
    )
    num_tokens: int = option(0, "Soft tokens to train per layer; 0: none.", at_least=0)
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
    rank: int | None = option(
        None,
        "Rank of a LoRA to train on the denoiser's attention; 0: no LoRA. Left out: 16, or 0 with "
        "--full or --num_tokens.",
        at_least=0,
    )
    full: bool = option(False, "Train all of the denoiser's weights.")
    gradient_checkpointing: bool = option(
        False,
        "Recompute the denoiser's activations in the backward pass: less memory, more time.",
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW. Left out: 1e-4 for a LoRA, 1e-5 for --full, 1e-3 for soft "
        "tokens alone.",
        above=0,
    )
    compile: bool = option(False, "Compile the denoiser with torch.compile.")


@dataclass(frozen=True)
class TimestepOptions:
    """Where in the schedule a recipe trains."""

    _argument_group_name = "timesteps"
    timestep_density: Literal["uniform", "logit_normal"] = option(
        "uniform", "Distribution of the timesteps; logit_normal is for flow models."
    )
    timestep_low: float = option(
        0.0,
        "Smallest timestep to train at, as a share of the schedule; 0: no noise.",
        at_least=0,
        below=1,
    )


def resolve(options: Any, of_world: str = "recipes/lab/models/flow") -> None:
    """Fills in what was left out, by what is trained, and checks options together.

    of_world: the model for the embedded world's data.

    Raises:
        ValueError: no model for other data, nothing to train, or settings that exclude each other.
    """
    options.model = given_model(options.model, options.data, of_world)
    if options.rank is None:
        options.rank = 0 if options.full or options.num_tokens else 16
    if options.full and options.rank:
        raise ValueError("expected --full or --rank, got both")
    if not (options.full or options.rank or options.num_tokens):
        raise ValueError("nothing to train: expected --num_tokens, --rank or --full")
    if options.learning_rate is None:
        options.learning_rate = 1e-5 if options.full else 1e-4 if options.rank else 1e-3
    steps = getattr(options, "max_train_steps", None)  # DDPO counts epochs
    resolve_agsm(options, steps or max(1, options.num_epochs * options.train_num_inner_epochs))
    if options.validation_guidance_scale is None:
        options.validation_guidance_scale = (
            1.0 if trains_guidance(options)
            else default_guidance_scale([options.model, options.merge_lora])
        )  # fmt: skip


def trains_guidance(options: Any) -> bool:
    """Whether what is trained is to be sampled without guidance."""
    used = getattr(options, "agsm_weight", getattr(options, "objective", "") == "agsm")
    return bool(used) and (options.agsm_guidance_scale or 1.0) > 1


class TrainedModel:
    """A pipeline in training.

    Args:
        options: of `ModelOptions`, `TimestepOptions`, `AGSMOptions` and `RunOptions`.
        state: accelerate's.
        task: what is trained on.

    Attributes:
        pipeline: the frozen pipeline around the denoiser.
        tokens: the denoiser with its soft tokens as accelerate has not wrapped it; None without.
        denoiser: the module to call, `agsm_loss.Denoiser`.
        parameters: what is trained, as the engine holds it.
        reference: makes a context in which the denoiser, with `Bank.OFF`, is the model as it was
            given.
        fingerprint: of what training begins with; a resumed run has the same.
        has_agsm: whether `agsm` has been called.

    Raises:
        ValueError: nothing to train, or the model cannot be loaded.
    """

    optimizer: Any

    def __init__(self, options: Any, state: Accelerator | PartialState, task: Task) -> None:
        self.options, self.task, self.has_agsm = options, task, False
        check_source("merge_lora", options.merge_lora)
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        casts = state.distributed_type == DistributedType.DEEPSPEED  # all of the denoiser
        held = torch.float32 if options.full and not casts else dtype[options.mixed_precision]
        self.pipeline = model = TextToImage.load(options.model, held, state.device)
        task.size = task.size or model.side
        if not is_world(options.data):
            model.check_side(task.size)
        prediction_type(model.pipe.scheduler)  # one whose noise is not known is refused at once
        if is_sharded(state):  # FSDP2 takes no channels_last
            model.denoiser.to(memory_format=torch.contiguous_format)
        self.fingerprint = _fingerprint(model)
        model.guidance = options.validation_guidance_scale
        if getattr(model.denoiser.config, "guidance_embeds", False):  # an input, in training too
            self.fingerprint += f" guidance {model.guidance:g}"
        if options.merge_lora:
            model.merge_lora(options.merge_lora)
            self.fingerprint += _content(options.merge_lora)  # a hub's is in the cache by now
        if options.full:
            model.denoiser.requires_grad_(True)
        if options.rank:
            model.add_lora(options.rank)
        self.tokens = _attach(options, model) if options.num_tokens else None
        if options.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        if options.compile:
            model.denoiser.compile()
        self.denoiser: Any = PlainDenoiser(model.denoiser) if self.tokens is None else self.tokens
        self.parameters = [one for one in self.denoiser.parameters() if one.requires_grad]
        self.reference: Callable[[], AbstractContextManager[Any]] = nullcontext
        if options.rank:
            self.reference = partial(adapters_off, model.denoiser)

    def prepare(self, accelerator: Accelerator, reference: bool = True) -> Self:
        """Gives the denoiser and its optimizer to accelerate.

        reference: whether `reference` is used; with --full it is a frozen copy of the weights.
        """
        options = self.options
        optimizer = torch.optim.AdamW(self.parameters, options.learning_rate, weight_decay=1e-4)
        module = blocks_of(self.denoiser, self.pipeline.denoiser)
        self.denoiser, self.optimizer = accelerator.prepare(module, optimizer)
        # FSDP2 has put its shards in their place.
        self.parameters = [one for one in self.denoiser.parameters() if one.requires_grad]
        if options.full and reference:
            self.reference = EMA(self.denoiser, decay=1.0).applied
        return self

    @property
    def module(self) -> Any:
        """The denoiser, for `Run.steps`."""
        return self.denoiser

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.pipeline.pipe.scheduler

    @property
    def number(self) -> int:
        """Of trained parameters, on all processes together."""
        return sum(getattr(one, "ds_numel", one.numel()) for one in self.parameters)

    def agsm(
        self, batch_size: int, weight: float | Callable[[int], float] = 1.0
    ) -> AGSMRegularizer:
        """AGSM over the denoiser, with λ = weight, on so many images a micro-step."""
        self.has_agsm = True
        return make_agsm(self.options, self.denoiser, batch_size, weight)

    def agsm_in_step(self, batch_size: int) -> AGSMRegularizer | None:
        """`agsm` in a host's step, with λ as `HostOptions` say; None where it is 0."""
        if not self.options.agsm_weight:
            return None
        return self.agsm(batch_size, agsm_weight(self.options))

    def captions(
        self, batch: Batch | PairBatch, compete: bool | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A batch's encoded captions, and what AGSM takes besides; nothing without it.

        compete: whether captions do; left out: with AGSM.

        The first is encoded row by row: the images' own captions, then their edits. The second is
        the captions themselves, and the encoded empty caption where it competes.
        """
        if not (self.has_agsm if compete is None else compete):
            return self.pipeline.encode_prompts(batch.captions), {}
        competitors = Competitors.read(self.options.candidates)
        hard = batch.hard if competitors.hard else None
        pool = caption_pool(batch.captions, hard or ())
        # Against the empty caption alone it does not matter which captions are alike.
        alike = competitors.rule is not None
        ids = iter(
            caption_ids(self.pipeline.pipe, pool, **self.pipeline.arguments) if alike else pool
        )
        # The empty caption with the others, so that all are as long.
        encoded = self.pipeline.encode_prompts([*pool, ""])
        return {name: value[:-1] for name, value in encoded.items()}, {
            "captions": [next(ids) for _ in batch.captions],
            "hard_negatives": None if hard is None else [[next(ids) for _ in one] for one in hard],
            "image_ids": batch.image_ids,
            "null": {name: value[-1:] for name, value in encoded.items()}
            if competitors.empty
            else None,
        }

    def timesteps(self, number: int, generator: torch.Generator) -> Tensor:
        """(number,) as the options draw them."""
        options = self.options
        return self.pipeline.timesteps(
            number, options.timestep_density, generator, options.timestep_low
        )

    def agsm_batch(
        self, batch: Batch, latents: Tensor, generator: torch.Generator, kept: Tensor | None = None
    ) -> AGSMBatch:
        """What AGSM trains on in an on-policy host, noised as the options say.

        latents: clean, of the batch's images or of the host's samples for its captions.
        kept: the rows that are trained on (all of them by default); the other rows' captions still
        compete.
        """
        conditioning, captions = self.captions(batch)
        kept = torch.arange(len(latents)) if kept is None else kept
        rule = Competitors.read(self.options.candidates).rule
        if rule is not None:
            asked = {name: captions.pop(name) for name in ("hard_negatives", "image_ids")}
            every = rule(captions["captions"], generator=generator, **asked)
            captions["captions"] = Candidates(
                every.index[kept], every.positives[kept], every.mask[kept], every.pool_size
            )
        elif len(kept) < len(latents):
            rows = kept.to(latents.device)
            conditioning = {name: value[rows] for name, value in conditioning.items()}
            captions |= {
                name: [captions[name][i] for i in kept] for name in ("captions", "image_ids")
            }
        latents = latents[kept.to(latents.device)]
        return AGSMBatch(
            latents,
            self.timesteps(len(latents), generator),
            torch.randn(latents.shape, generator=generator).to(latents),
            conditioning,
            image_conditioning=self.pipeline.image_conditioning(batch.pixels[kept]),
            **captions,
        )


def _fingerprint(model: TextToImage) -> str:
    """Of the pipeline's weights, buffers, configs and vocabularies."""
    weights, settings = {}, {}
    for name, part in model.pipe.components.items():
        if isinstance(part, nn.Module):
            tensors = [*part.named_parameters(), *part.named_buffers()]
            weights |= {f"{name}.{key}": value for key, value in tensors}
        config = getattr(part, "config", {})
        known = config.to_dict() if hasattr(config, "to_dict") else config
        settings[name] = {k: str(v) for k, v in known.items() if not k.startswith("_")}
        if hasattr(part, "get_vocab"):
            settings[name] = sorted(part.get_vocab().items())
    return fingerprint_of(weights, settings)


def _content(lora: str) -> str:
    """Of the files of a LoRA, a folder or a hub id that is in the cache."""
    place = found_here(lora)
    files = [] if place is None else [place] if place.is_file() else place.rglob("*.safetensors")
    return fingerprint_of({}, [digest_of(one) for one in sorted(files)])


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
