"""AGSM in ai-toolkit (ostris/ai-toolkit), as an extension, for every model that it trains.

In ai-toolkit's folder, a new file `extensions/agsm/__init__.py`:

    from agsm_loss.integrations.trainers.ai_toolkit import AI_TOOLKIT_EXTENSIONS

and in the job's YAML file, in place of `type: diffusion_trainer` or `sd_trainer`:

    - type: agsm_trainer
      agsm_guidance_scale: 3

ai-toolkit's `do_guidance_loss` moves the target to u + s(τ − u), u being the prediction under the
empty prompt. That is the same loss times s²: its gradient is s times AGSM's.

>>> import torch
>>> from types import SimpleNamespace
>>> from agsm_loss.integrations.trainers.ai_toolkit import AGSMTrainer
>>> class SDTrainer:  # ai-toolkit's
...     train_config = SimpleNamespace(
...         do_guidance_loss=False, loss_type="mse", train_text_encoder=False
...     )
...     dataset_configs = []
...     unconditional_embeds = torch.tensor([1.0])
...     def get_conf(self, key, default): return default
...     def predict_noise(self, noisy_latents, conditional_embeds, is_primary_pred=False):
...         return noisy_latents * conditional_embeds
>>> class Trainer(AGSMTrainer, SDTrainer):
...     concat_prompt_embeds = staticmethod(torch.cat)
>>> trainer = Trainer()
>>> batch = torch.ones(2), torch.tensor([4.0, 7.0])
>>> trainer.predict_noise(*batch, is_primary_pred=True)  # (4 + 2)/3 and (7 + 2)/3
tensor([2., 3.])
"""

import inspect
from typing import Any

from torch import Tensor

from agsm_loss import _checks
from agsm_loss.functional import undo_guidance
from agsm_loss.integrations.denoisers import no_grad_pass


class AGSMTrainer:
    """What is put before ai-toolkit's `SDTrainer`, or a subclass of it, in the bases of a class.

    The trainer's loss, with its masks and weightings, gets its prediction with guidance undone.
    Where its target is the model's own prediction (`prior_reg`, `inverted_mask_prior`), the loss is
    the trainer's. `agsm_guidance_scale` of the process's config is s ≥ 1, 3 by default; 1 is the
    trainer alone.

    Raises:
        ValueError: a scale below 1; `do_guidance_loss`, which would do the same once more; a loss
            that takes another prediction: mean_flow, or that of pairs (`unconditional_path`).
    """

    concat_prompt_embeds: Any
    dataset_configs: Any
    do_long_prompts: bool
    encode_static_prompt: Any
    get_conf: Any
    train_config: Any
    unconditional_embeds: Any
    _agsm_shift: Tensor | float = 0.0  # by which undoing guidance moved the prediction

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agsm_guidance_scale = self.get_conf("agsm_guidance_scale", 3.0)
        _checks.check_guidance_scale(self.agsm_guidance_scale)
        if self.train_config.do_guidance_loss:
            raise ValueError(
                "do_guidance_loss: expected false with agsm_guidance_scale, got true. Both train "
                "guidance in; keep one."
            )
        for name, found in {
            "loss_type: mean_flow": self.train_config.loss_type == "mean_flow",
            "unconditional_path": any(one.unconditional_path for one in self.dataset_configs),
        }.items():
            if found and self.agsm_guidance_scale != 1:
                raise ValueError(
                    f"{name}: expected a job without it, got agsm_guidance_scale "
                    f"{self.agsm_guidance_scale} too. Its loss takes predictions that AGSM does "
                    "not change; keep one."
                )

    def predict_noise(self, *args: Any, **kwargs: Any) -> Tensor:
        """ai-toolkit's prediction; with guidance undone where it is the one that is trained."""
        predict = super().predict_noise  # type: ignore[misc]
        pred: Tensor = predict(*args, **kwargs)
        given = inspect.signature(predict).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if self.agsm_guidance_scale == 1 or not given.get("is_primary_pred"):
            return pred
        batch: Any = given.get("batch")
        null = self.unconditional_embeds
        if self.train_config.train_text_encoder:  # those were encoded before training
            prompt = [self.train_config.unconditional_prompt]
            with no_grad_pass():
                null = self.encode_static_prompt(prompt, long_prompts=self.do_long_prompts)
        nulls = [null] * len(given["noisy_latents"])
        given["conditional_embeds"] = self.concat_prompt_embeds(nulls)
        given["is_primary_pred"] = False
        sound = getattr(batch, "audio_pred", None)
        if sound is not None:
            batch.audio_pred_slot = "audio_pred_uncond"
        with no_grad_pass():
            null_pred = predict(**given)
        if sound is not None:
            batch.audio_pred_slot = None
            batch.audio_pred = undo_guidance(
                sound, batch.audio_pred_uncond, self.agsm_guidance_scale
            )
        unguided = undo_guidance(pred, null_pred, self.agsm_guidance_scale)
        self._agsm_shift = (unguided - pred).detach()
        return unguided

    def calculate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """ai-toolkit's loss. A target that is the model's own prediction moves with the trained."""
        if kwargs.get("prior_pred") is not None:
            kwargs["prior_pred"] = kwargs["prior_pred"] + self._agsm_shift
        loss: Tensor = super().calculate_loss(*args, **kwargs)  # type: ignore[misc]
        return loss


class AGSMExtension:
    """What ai-toolkit looks for in `AI_TOOLKIT_EXTENSIONS`."""

    uid = "agsm_trainer"
    name = "AGSM"

    @classmethod
    def get_process(cls) -> type:
        """ai-toolkit's trainer with AGSM.

        Raises:
            ImportError: ai-toolkit is not where Python looks for modules.
        """
        try:
            from extensions_built_in.sd_trainer.DiffusionTrainer import DiffusionTrainer
            from toolkit.prompt_utils import concat_prompt_embeds
        except ImportError as error:
            raise ImportError(
                f"ai-toolkit: expected its trainer as at commit {COMMIT[:7]}, got: {error}. Run "
                "ai-toolkit's run.py in a clone of https://github.com/ostris/ai-toolkit."
            ) from error
        parts = {"concat_prompt_embeds": staticmethod(concat_prompt_embeds)}
        return type("AGSMTrainer", (AGSMTrainer, DiffusionTrainer), parts)


COMMIT = "27a03a91f23eb1b757d5ec2e80ee3e129cfcc350"
AI_TOOLKIT_EXTENSIONS = [AGSMExtension]
