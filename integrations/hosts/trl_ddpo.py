"""DDPO (arXiv 2305.13301) by trl's own trainer, with AGSM as a second loss.

trl has DDPO up to version 0.23. AGSM needs little of a reward-driven loop: the loss, to which
`agsm_on(batch, agsm, scheduler)` of `step` is added; a call of `agsm.update_ema()` after each
`optimizer.step()`; and clean images with captions.

>>> import itertools
>>> from accelerate import PartialState
>>> from diffusers import StableDiffusionPipeline
>>> from peft import LoraConfig
>>> from trl import DDPOConfig
>>> from agsm_loss import AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer, LoadedPipeline
>>> _ = PartialState(cpu=True)  # trl's pipeline logs before accelerate's state exists
>>> pipe = StableDiffusionPipeline.from_pretrained("recipes/lab/models/epsilon")  # yours
>>> _ = pipe.unet.requires_grad_(False)
>>> pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
>>> config = DDPOConfig(
...     num_epochs=1, sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=1,
...     train_batch_size=2, train_gradient_accumulation_steps=1, mixed_precision="no",
... )
>>> captions = itertools.cycle(["two red circles", "a blue square"])
>>> def prompt():  # a prompt and its metadata
...     return next(captions), {}
>>> def reward(images, prompts, metadata):  # images (B, 3, H, W) in [0, 1]
...     return images[:, 0].mean((1, 2)), {}
>>> def regularizer(denoiser, parameters):
...     return AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3), weight=1.0)
>>> trainer = AGSMDDPOTrainer(
...     config, reward, prompt, LoadedPipeline(pipe), agsm=regularizer, best=1.0, batch_size=2
... )
>>> trainer.train()
>>> trainer.agsm.step  # optimizer steps
1

AGSM's images come from a captioned data set (`batches`), where its images show what prompts should
give; AGSM then keeps the model close to its prompts whatever the reward asks for. Where there is no
such set and the reward itself judges alignment, they are the run's own samples with the best
rewards (`best`). AGSM treats those as true matches of their prompts, and so repeats the reward's
mistakes.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss import AGSMRegularizer
from agsm_loss.integrations import how_to_install
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.base import AGSMBatch, agsm_on
from agsm_loss.integrations.hosts.ddpo_parts import (
    BestSamples,
    Progress,
    check_fraction,
    check_schedule,
    float32_states,
    kept_precision,
    replaced,
)
from agsm_loss.integrations.tokens.attach import AttachedTokens

try:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from packaging.version import Version
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(
        "agsm_loss.integrations.hosts.trl_ddpo needs diffusers, packaging and safetensors. "
        + how_to_install("trl")
    ) from error


def _check_trl() -> None:
    """ImportError where trl is missing, or is a version without DDPO."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not Version("0.20") <= Version(found) < Version("0.24"):
        raise ImportError(
            f"trl: expected >=0.20,<0.24, the last with DDPOTrainer, got {found}. "
            + how_to_install("trl")
        )


_check_trl()
from trl import DDPOConfig, DDPOTrainer
from trl.models import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline
from trl.trainer.utils import PerPromptStatTracker

WEIGHTS, COMPLETE = "trained.safetensors", "complete"


class AGSMDDPOTrainer(DDPOTrainer):
    """trl's `DDPOTrainer` with λ·AGSM added to the loss of its training steps.

    Without `agsm`, or where its weight is 0, the trained parameters are those of trl's trainer, bit
    for bit. Beyond AGSM it differs in four ways:

    - A checkpoint holds only what is trained, and a resumed run continues at the epoch, step and
      averages where it stopped.
    - On several processes the gradients are averaged. trl's trainer calls the UNet without its DDP
      wrapper, so that each process trains a model of its own.
    - A sampling schedule whose last step has no noise is an error: its log-probability is not
      finite.
    - A gradient that is not finite ends the run before it reaches the weights.
    - Equal rewards have advantage 0: trl divides a rounding error by a rounding error.
    - In mixed precision the likelihood ratio is 1 before the first update all the same: states are
      in float32, and sampled in the batches that they are trained in. The VAE, and where the whole
      UNet is trained its weights and the text encoder, keep the precision that they were loaded in.

    Args:
        config, reward_function, prompt_function, sd_pipeline, image_samples_hook: trl's.
        agsm: a function of the denoiser and the list of trained parameters that returns the
            regularizer. It is called after trl has added its LoRA. Trained are trl's LoRA or UNet,
            and the tokens.
        batches: a function of the micro-step's number, counted over the whole run, that returns the
            `AGSMBatch` of that micro-step. A resumed run gets the numbers of an uninterrupted one.
        best: without `batches`: the share of each epoch's samples, of all processes, best rewards
            first, that AGSM trains on, noised at uniform timesteps. In (0, 1].
        batch_size: images of these a micro-step. Their prompts are each other's negatives, so 2 at
            least.
        every: run AGSM in one of so many micro-steps, with so many times the weight: the same
            gradient in expectation, for less time. A divisor of the micro-steps of an optimizer
            step (`train_gradient_accumulation_steps` times the trained timesteps).
        attached: soft tokens attached to `sd_pipeline.unet`, trained together with trl's part.

    Attributes:
        equal: whether all rewards of the last epoch were equal.

    Raises:
        ImportError: (when this module is imported) trl is missing, or has no DDPO.
        ValueError: best, batch_size or every out of range, a schedule whose last step has no
            noise, or a `train_timestep_fraction` of no step.
        FloatingPointError: (in `step` and `train`) the gradient is not finite.
    """

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: Callable[..., Any],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: Callable[..., Any] | None = None,
        *,
        agsm: Callable[[nn.Module, list[nn.Parameter]], AGSMRegularizer] | None = None,
        batches: Callable[[int], AGSMBatch] | None = None,
        best: float = 0.25,
        batch_size: int = 8,
        every: int = 1,
        attached: AttachedTokens | None = None,
    ) -> None:
        if not 0 < best <= 1 or batch_size < 2 or every < 1:
            raise ValueError(
                "expected best in (0, 1], batch_size of 2 at least and every of 1 at least, got "
                f"{best}, {batch_size} and {every}."
            )
        check_schedule(sd_pipeline.scheduler, config.sample_num_steps, config.sample_eta)
        check_fraction(config.sample_num_steps, config.train_timestep_fraction)
        self.attached = attached
        self.agsm: AGSMRegularizer | None = None
        self.batches = batches
        self.every = every
        self._metrics: dict[str, list[Tensor]] = {}
        self._prompts: list[str] = []
        self._progress = Progress(self)
        self.epoch = self.global_step = self.micro_step = 0
        self.equal = False
        self._save_freq = config.save_freq
        config = replace(config, save_freq=2**62)  # saving is done here
        with ExitStack() as stack:
            if config.mixed_precision in ("fp16", "bf16"):
                whole = () if sd_pipeline.autocast else (sd_pipeline.unet, sd_pipeline.text_encoder)
                for part in (sd_pipeline.vae, *whole):
                    stack.enter_context(kept_precision(part))
            super().__init__(
                config, reward_function, prompt_function, sd_pipeline, image_samples_hook
            )
        if config.per_prompt_stat_tracking:
            self.stat_tracker = _PerPrompt(
                config.per_prompt_stat_tracking_buffer_size,
                config.per_prompt_stat_tracking_min_count,
            )
        self._own = BestSamples(best, batch_size, config.seed, self.accelerator.process_index)
        a_step = self.accelerator.gradient_accumulation_steps
        if a_step % every:
            raise ValueError(
                f"every: expected a divisor of the {a_step} micro-steps of an optimizer step, got "
                f"{every}."
            )
        parameters = self._trained()
        # What is clipped together: trl's own, and the tokens.
        self.trainable_layers = list(parameters.values())
        if agsm is not None:
            module = (
                TokenDenoiser(attached.model, tokens=attached)
                if attached
                else PlainDenoiser(sd_pipeline.unet)
            )
            self.agsm = agsm(module, list(parameters.values()))
        self._progress.restore()

    def step(self, epoch: int, global_step: int) -> int:
        """An epoch of sampling, scoring and training, as trl's.

        Args:
            epoch: its number, from 0.
            global_step: optimizer steps so far.

        Returns:
            Optimizer steps after it.
        """
        self.epoch, self.global_step = epoch, global_step
        done = int(super().step(epoch, global_step))
        if epoch != 0 and epoch % self._save_freq == 0:
            self.save_checkpoint()
        return done

    def save_checkpoint(self) -> None:
        """Saves a checkpoint. Call it between two epochs, on every process.

        trl's `save_freq` calls it too. (trl's own trainer saves on the first process alone, while
        the others wait for another exchange.)
        """
        self.accelerator.save_state()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:  # marks it as whole: a run can be killed while saving
            folder = Path(self.accelerator.project_dir) / "checkpoints"
            (folder / f"checkpoint_{self.accelerator.save_iteration - 1}" / COMPLETE).touch()

    def train(self, epochs: int | None = None) -> None:
        """All epochs; a resumed run continues where it stopped.

        epochs: the number of the last epoch plus 1; default: the config's `num_epochs`.
        """
        step = self.global_step
        for epoch in range(self.first_epoch, self.config.num_epochs if epochs is None else epochs):
            step = self.step(epoch, step)

    def calculate_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """trl's loss of one micro-step plus λ·AGSM, its approximate KL and clipped share."""
        loss, kl, clipped = super().calculate_loss(*args, **kwargs)
        number, self.micro_step = self.micro_step, self.micro_step + 1
        if self.agsm is None or number % self.every or not self.agsm.weight(self.agsm.step):
            return loss, kl, clipped
        if self.batches is None:
            null = self.neg_prompt_embed if self.agsm.candidates is None else None
            batch = self._own.batch(number, null)
        else:
            batch = self.batches(number)
        with self.autocast():
            term = agsm_on(batch, self.agsm, self.sd_pipeline.scheduler)
        for name, value in term.metrics.items():
            self._metrics.setdefault(name, []).append(value.detach().float())
        return loss + self.every * term.loss, kl, clipped

    def compute_rewards(self, prompt_image_pairs: Any, is_async: bool = False) -> Any:
        """trl's rewards. Where there are no batches, they choose the samples for AGSM."""
        rewards, metadata = super().compute_rewards(prompt_image_pairs, is_async)
        every = self.accelerator.gather(torch.cat([reward.flatten() for reward in rewards]))
        self.equal = bool((every == every[0]).all())
        if self.agsm is not None and self.batches is None:
            self._own.choose(torch.cat([reward.flatten() for reward in rewards]))
        return rewards, metadata

    def _generate_samples(self, iterations: int, batch_size: int) -> Any:
        if self.accelerator.mixed_precision == "no":
            samples, pairs = super()._generate_samples(iterations, batch_size)
        else:  # of another size of batch, half precision would make other predictions
            size = self.config.train_batch_size
            with float32_states(self.sd_pipeline.sd_pipeline):
                samples, pairs = super()._generate_samples(iterations * batch_size // size, size)
        self._prompts = [prompt for _, prompts, _ in pairs for prompt in prompts]
        if self.agsm is not None and self.batches is None:
            pipe = self.sd_pipeline.sd_pipeline
            self._own.offer(samples, pairs, pipe.scheduler, pipe)
        return samples, pairs

    def _train_batched_samples(
        self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Any
    ) -> int:
        if self.equal and not self.config.per_prompt_stat_tracking:
            for sample in batched_samples:
                sample["advantages"] = torch.zeros_like(sample["advantages"])
        self.global_step = int(
            super()._train_batched_samples(inner_epoch, epoch, global_step, batched_samples)
        )
        return self.global_step

    def _setup_optimizer(self, trainable_layers_parameters: Any) -> torch.optim.Optimizer:
        parameters = list(trainable_layers_parameters)
        if self.attached is not None:
            self.attached.tokens.to(self.accelerator.device)
            parameters += self.attached.tokens.parameters()
        optimizer: torch.optim.Optimizer = super()._setup_optimizer(parameters)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self.accelerator.register_for_checkpointing(self._progress)
        if self.accelerator.num_processes > 1:
            self._exchange_gradients()
        return optimizer

    def _before_step(self, *_: Any) -> None:
        """Runs before each step that the optimizer takes; not where fp16 overflowed."""
        gradients = [one.grad for one in self.trainable_layers if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"gradient's norm: expected a finite number, got {norm.item()} in step "
                f"{self.global_step} of epoch {self.epoch}, before micro-step {self.micro_step}, "
                f"on samples of {[prompt[:80] for prompt in self._prompts]}. The step is not "
                "taken. Look at the rewards and AGSM's images, or start anew with a lower "
                "learning rate."
            )

    def _after_step(self, *_: Any) -> None:
        """Runs after each step that the optimizer takes; not where fp16 overflowed."""
        if self.agsm is None:
            return
        self.agsm.update_ema()
        if self._metrics:
            means = {name: torch.stack(values).mean() for name, values in self._metrics.items()}
            self._metrics = {}
            reduced = self.accelerator.reduce(
                {name: mean.to(self.accelerator.device) for name, mean in means.items()}, "mean"
            )
            self.accelerator.log(
                {name: value.item() for name, value in reduced.items()}, step=self.global_step
            )
        self.global_step += 1

    def _trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name: the UNet's, then the tokens'."""
        unet = self.accelerator.unwrap_model(self.sd_pipeline.unet)
        named = dict(unet.named_parameters())
        if self.attached is not None:
            named |= {f"tokens.{n}": p for n, p in self.attached.tokens.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def _exchange_gradients(self) -> None:
        """Averages the gradients over the processes in an optimizer step's last micro-step."""
        import torch.distributed as dist
        from accelerate.utils import broadcast

        def exchange(parameter: Tensor) -> None:
            if self.accelerator.sync_gradients and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

        for parameter in self._trained().values():
            broadcast(parameter.data)  # each process has drawn its own
            parameter.register_post_accumulate_grad_hook(exchange)

    def _save_model_hook(self, models: Any, weights: Any, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            own = {name: p.data.contiguous() for name, p in self._trained().items()}
            save_file(own, Path(output_dir) / WEIGHTS)
        weights.clear()

    def _load_model_hook(self, models: Any, input_dir: str) -> None:
        saved = load_file(Path(input_dir) / WEIGHTS)
        own = self._trained()
        if saved.keys() != own.keys():
            raise ValueError(
                f"{input_dir}: expected parameters {sorted(own)}, got {sorted(saved)}. Resume with "
                "the LoRA and the tokens that the run began with."
            )
        for name, parameter in own.items():
            parameter.data.copy_(saved[name])
        models.clear()


class _PerPrompt(PerPromptStatTracker):
    """trl's advantages, and 0 where a reward is compared with its equals alone."""

    def update(self, prompts: Any, rewards: Any) -> Any:
        advantages = super().update(prompts, rewards)
        for row, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True)):
            kept = self.stats[prompt]
            if all(one == reward for one in (rewards if len(kept) < self.min_count else kept)):
                advantages[row] = 0
        return advantages


class LoadedPipeline(DefaultDDPOStableDiffusionPipeline):
    """A loaded Stable Diffusion pipeline for the trainer, with its adapters and tokens.

    trl's own class loads a pipeline from a folder and adds a LoRA of rank 4.

    Args:
        pipe: parameters of its UNet that have `requires_grad` are trained. As in trl, its VAE and
            text encoder are frozen, its scheduler is replaced by DDIM's, and its safety checker is
            removed.
        full: the whole UNet is trained; trl then runs it in autocast.
    """

    def __init__(self, pipe: StableDiffusionPipeline, *, full: bool = False) -> None:
        self.sd_pipeline = pipe
        self.use_lora = not full
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.safety_checker = None
        for frozen in (pipe.vae, pipe.text_encoder):
            frozen.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """trl's sampling; without guidance only the prompts' embeddings are run.

        diffusers' `_encode_prompt` puts the negative prompts' before them even without guidance.
        """
        if kwargs.get("guidance_scale", 7.5) > 1 or kwargs.get("prompt_embeds") is None:
            return super().__call__(*args, **kwargs)
        encode = {"_encode_prompt": lambda *_, prompt_embeds, **__: prompt_embeds}
        with replaced(self.sd_pipeline, **encode):
            return super().__call__(*args, **kwargs)

    def get_trainable_layers(self) -> nn.Module:
        """The UNet, with its trained parameters in float32: fp16's gradients can't be unscaled."""
        for parameter in self.sd_pipeline.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        unet: nn.Module = self.sd_pipeline.unet
        return unet
