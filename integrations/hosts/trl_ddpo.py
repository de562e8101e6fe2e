"""DDPO (arXiv 2305.13301) by trl's own trainer, with AGSM as a second loss.

    trainer = AGSMDDPOTrainer(
        config, reward, prompts, pipeline,                        # trl's own arguments
        agsm=lambda denoiser, parameters: AGSMRegularizer(
            denoiser, EMA(parameters, decay=0.999), AGSMLoss(neg_scale=0), weight=1.0
        ),
        batches=my_pairs,                                         # or best=0.25: the run's own
    )
    trainer.train()

trl shipped DDPO up to 0.23. AGSM needs little of any reward-driven loop: the loss, to which
`agsm_on(batch, agsm, scheduler)` is added; `agsm.update_ema()` after `optimizer.step()`; and clean
images with captions, from data or from the loop's own samples.

AGSM's images. From a captioned data set (`batches`) where its pictures are what prompts should
give: they hold the model to its prompts whatever the reward does. From the run's own best-rewarded
samples (`best`) where there is no such set, and the reward itself judges alignment: AGSM then takes
the reward's favourites for true matches of their prompts, and so repeats a reward's mistakes.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agsm_loss import AGSMRegularizer
from agsm_loss.integrations.denoisers import PlainDenoiser, TokenDenoiser
from agsm_loss.integrations.hosts.best_samples import BestSamples, Progress, check_schedule
from agsm_loss.integrations.hosts.step import AGSMBatch, agsm_on
from agsm_loss.integrations.tokens.attach import AttachedTokens


def _check_trl() -> None:
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not Version("0.20") <= Version(found) < Version("0.24"):
        raise ImportError(
            f"trl: expected >=0.20,<0.24, the last with DDPOTrainer, got {found}. "
            "pip install 'agsm-loss[trl]'"
        )


_check_trl()
from trl import DDPOConfig, DDPOTrainer
from trl.models import DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline

WEIGHTS, COMPLETE = "trained.safetensors", "complete"


class AGSMDDPOTrainer(DDPOTrainer):
    """trl's `DDPOTrainer` with λ·AGSM in the loss of its training steps.

    Without `agsm`, or where its weight is 0, the parameters become what trl's trainer makes of
    them, bit for bit. Beyond AGSM it differs from trl's in three places, all of them outside a
    single run's steps. Checkpoints hold just what is trained, and a resumed run goes on at the
    epoch, step and averages where it stopped. On several processes gradients are averaged over them
    (trl's trainer calls the UNet without its DDP wrapper, so that each process trains a model of
    its own). A sampling schedule whose last step has no noise is refused (its log-probability is
    not finite).

    Args:
        config, reward_function, prompt_function, sd_pipeline, image_samples_hook: trl's.
        agsm: the module to call and the trained parameters -> the regularizer, made when trl has
            put its LoRA in. What is trained is trl's LoRA or UNet, and the tokens.
        batches: number of the micro-step -> what AGSM trains on there (`AGSMBatch`). A function of
            the number, so that a resumed run sees what an uninterrupted one sees.
        best: without `batches`: the share of each epoch's samples, best reward first, that AGSM
            trains on, noised again at uniform timesteps.
        batch_size: images of these a micro-step; their prompts compete, so 2 at least.
        every: run AGSM in one of so many micro-steps, `every` times as heavy: the same gradient in
            expectation for less time. Must divide the micro-steps of an optimizer step
            (`train_gradient_accumulation_steps` times the trained timesteps).
        attached: soft tokens on `sd_pipeline.unet`; they are trained together with what trl trains.

    Raises:
        ImportError: (at import) trl is missing, or has no DDPO.
        ValueError: arguments that do not go together, or a schedule whose last step has no noise.
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
        check_schedule(sd_pipeline.scheduler, config)
        self.attached = attached
        self.agsm: AGSMRegularizer | None = None
        self.batches = batches
        self.every = every
        self._metrics: dict[str, list[Tensor]] = {}
        self._progress = Progress(self)
        self._epoch = self.global_step = self._micro_step = 0
        self._save_freq = config.save_freq
        config = replace(config, save_freq=2**62)  # saving is done here
        super().__init__(config, reward_function, prompt_function, sd_pipeline, image_samples_hook)
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
        """trl's: an epoch of sampling, scoring and training. Returns the next global step."""
        self._epoch, self.global_step = epoch, global_step
        done = int(super().step(epoch, global_step))
        if epoch != 0 and epoch % self._save_freq == 0:
            self.save_checkpoint()
        return done

    def save_checkpoint(self) -> None:
        """A checkpoint between two epochs; to be called on every process.

        trl's `save_freq` comes to this too: trl itself saves on the first process alone, while the
        others wait for something else.
        """
        self.accelerator.save_state()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:  # a run can be killed while it writes one
            folder = Path(self.accelerator.project_dir) / "checkpoints"
            (folder / f"checkpoint_{self.accelerator.save_iteration - 1}" / COMPLETE).touch()

    def train(self, epochs: int | None = None) -> None:
        """All epochs, from where a resumed run stopped."""
        step = self.global_step
        for epoch in range(self.first_epoch, self.config.num_epochs if epochs is None else epochs):
            step = self.step(epoch, step)

    def calculate_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """trl's loss of one micro-step (scalar), with λ·AGSM in it; its KL and clipped share."""
        loss, kl, clipped = super().calculate_loss(*args, **kwargs)
        number, self._micro_step = self._micro_step, self._micro_step + 1
        if self.agsm is None or number % self.every or not self.agsm.weight(self.agsm.step):
            return loss, kl, clipped
        batch = self._own.batch(number) if self.batches is None else self.batches(number)
        with self.autocast():
            term = agsm_on(batch, self.agsm, self.sd_pipeline.scheduler)
        for name, value in term.metrics.items():
            self._metrics.setdefault(name, []).append(value.detach().float())
        return loss + self.every * term.loss, kl, clipped

    def compute_rewards(self, prompt_image_pairs: Any, is_async: bool = False) -> Any:
        """trl's; AGSM's own samples are chosen by them."""
        rewards, metadata = super().compute_rewards(prompt_image_pairs, is_async)
        if self.agsm is not None and self.batches is None:
            self._own.choose(torch.cat([reward.flatten() for reward in rewards]))
        return rewards, metadata

    def _generate_samples(self, iterations: int, batch_size: int) -> Any:
        samples, pairs = super()._generate_samples(iterations, batch_size)
        if self.agsm is not None and self.batches is None:
            self._own.offer(samples, pairs, self.sd_pipeline.scheduler)
        return samples, pairs

    def _train_batched_samples(self, *args: Any, **kwargs: Any) -> int:
        self.global_step = int(super()._train_batched_samples(*args, **kwargs))
        return self.global_step

    def _setup_optimizer(self, trainable_layers_parameters: Any) -> torch.optim.Optimizer:
        parameters = list(trainable_layers_parameters)
        if self.attached is not None:
            self.attached.tokens.to(self.accelerator.device)
            parameters += self.attached.tokens.parameters()
        optimizer: torch.optim.Optimizer = super()._setup_optimizer(parameters)
        optimizer.register_step_post_hook(self._after_step)
        self.accelerator.register_for_checkpointing(self._progress)
        if self.accelerator.num_processes > 1:
            self._exchange_gradients()
        return optimizer

    def _after_step(self, *_: Any) -> None:
        """Behind each step that the optimizer takes (none where fp16 overflowed)."""
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
        """Every trained parameter by name, the tokens' behind those of the UNet."""
        unet = self.accelerator.unwrap_model(self.sd_pipeline.unet)
        named = dict(unet.named_parameters())
        if self.attached is not None:
            named |= {f"tokens.{n}": p for n, p in self.attached.tokens.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def _exchange_gradients(self) -> None:
        """Gradients become the processes' mean in the last micro-step of an optimizer step."""
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


class LoadedPipeline(DefaultDDPOStableDiffusionPipeline):
    """For the trainer: a Stable Diffusion pipeline that is loaded, with its adapters and tokens.

    trl's own class loads one from a folder and puts a LoRA of rank 4 on it.

    Args:
        pipe: what is to be trained of its UNet has `requires_grad`; its scheduler becomes DDIM's,
            and its safety checker is dropped, as with trl.
        full: all of the UNet is trained (trl then runs it in autocast).
    """

    def __init__(self, pipe: StableDiffusionPipeline, *, full: bool = False) -> None:
        self.sd_pipeline = pipe
        self.use_lora = not full
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.safety_checker = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """trl's sampling. Without guidance only the prompts' embeddings are run.

        diffusers' `_encode_prompt` puts the negative ones before them even then.
        """
        if kwargs.get("guidance_scale", 7.5) > 1 or kwargs.get("prompt_embeds") is None:
            return super().__call__(*args, **kwargs)
        self.sd_pipeline._encode_prompt = lambda *_, prompt_embeds, **__: prompt_embeds
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del self.sd_pipeline._encode_prompt

    def get_trainable_layers(self) -> nn.Module:
        for parameter in self.sd_pipeline.unet.parameters():
            if parameter.requires_grad:  # fp16's gradients could not be unscaled
                parameter.data = parameter.data.float()
        unet: nn.Module = self.sd_pipeline.unet
        return unet
