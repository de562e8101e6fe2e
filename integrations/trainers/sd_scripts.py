"""AGSM in sd-scripts (kohya-ss/sd-scripts): LoRA of SD1.5, SDXL, SD3, Flux.1 and the others.

In sd-scripts' folder, a new file `train_agsm.py`, here for SDXL:

    from agsm_loss.integrations.trainers.sd_scripts import AGSMNetworkTrainer
    from sdxl_train_network import SdxlNetworkTrainer, setup_parser, train_util

    class Trainer(AGSMNetworkTrainer, SdxlNetworkTrainer):
        guidance_scale = 3

    if __name__ == "__main__":
        parser = setup_parser()
        Trainer().train(train_util.read_config_from_file(parser.parse_args(), parser))

Start it as you would `sdxl_train_network.py`, with the same arguments.

Each trainer of sd-scripts draws noise and timesteps, predicts and makes the target in one method.
It is called twice from the same random state: under the empty caption, without gradient, and as it
is. The loss then gets the second prediction with guidance undone.

>>> import torch
>>> from agsm_loss.integrations.trainers.sd_scripts import AGSMNetworkTrainer
>>> class NetworkTrainer:  # sd-scripts', of a model with one weight
...     weight = torch.tensor(1.0, requires_grad=True)
...     def get_noise_pred_and_target(self, latents, batch, text_encoder_conds, is_train=True):
...         noise = torch.randn_like(latents)
...         with torch.set_grad_enabled(is_train):
...             return self.weight * text_encoder_conds[0], noise - latents, torch.rand(1), None
>>> class Trainer(AGSMNetworkTrainer, NetworkTrainer):
...     guidance_scale = 3
>>> trainer = Trainer()
>>> trainer._encode_null = lambda: [torch.tensor([[1.0]])]  # the empty caption, encoded
>>> text = [torch.tensor([[4.0], [7.0]])]
>>> trainer.get_noise_pred_and_target(torch.ones(2, 1), {}, text)[0].tolist()  # (4 + 2)/3 and so on
[[2.0], [3.0]]
"""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from agsm_loss import _checks
from agsm_loss.functional import undo_guidance
from agsm_loss.integrations.denoisers import no_grad_pass


class AGSMNetworkTrainer:
    """What is put before a `NetworkTrainer` of sd-scripts in the bases of a class.

    Attributes:
        guidance_scale: s ≥ 1, the scale that you would sample with; 1 is the trainer alone. Set it
            in the class.

    Raises:
        ValueError: a scale below 1.
        RuntimeError: (in training) the two passes did not have the same noise and timesteps.
    """

    guidance_scale: ClassVar[float | int]

    def __init__(self) -> None:
        _checks.check_guidance_scale(self.guidance_scale)
        super().__init__()
        self._cached_null: list[Tensor | None] | None = None
        self._encode_null: Any = None

    def cache_text_encoder_outputs_if_needed(self, *args: Any, **kwargs: Any) -> None:
        """sd-scripts' caching, with the empty caption where captions are encoded once."""
        host = super().cache_text_encoder_outputs_if_needed  # type: ignore[misc]
        given = inspect.signature(host).bind(*args, **kwargs).arguments
        dataset = given["dataset"]
        cache = dataset.new_cache_text_encoder_outputs

        def with_null(models: Any, accelerator: Any) -> Any:
            # Here the text encoders are on the device.
            with torch.no_grad():
                masks = {"apply_lg_attn_mask": None, "apply_t5_attn_mask": None}  # the strategy's
                self._cached_null = _empty_caption(models, **masks)
            return cache(models, accelerator)

        dataset.new_cache_text_encoder_outputs = with_null
        try:
            host(*args, **kwargs)
        finally:
            del dataset.new_cache_text_encoder_outputs

    def process_batch(self, *args: Any, **kwargs: Any) -> Tensor:
        """sd-scripts' loss of a batch, of predictions with guidance undone."""
        host = super().process_batch  # type: ignore[misc]
        given = inspect.signature(host).bind(*args, **kwargs).arguments

        def encoded() -> list[Tensor | None]:
            cached = self._cached_null
            if cached is not None and not given.get("train_text_encoder", True):
                return cached
            models = self.get_models_for_text_encoding(  # type: ignore[attr-defined]
                given["args"], given["accelerator"], given["text_encoders"]
            )
            with given["accelerator"].autocast():
                null = _empty_caption(models)
            if cached is None:
                return null
            return [old if new is None else new for old, new in zip(cached, null, strict=True)]

        self._encode_null = encoded
        loss: Tensor = host(*args, **kwargs)
        return loss

    def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """sd-scripts' prediction with guidance undone, its target, timesteps and weighting."""
        host = super().get_noise_pred_and_target  # type: ignore[misc]
        if self.guidance_scale == 1:
            return tuple(host(*args, **kwargs))
        given = inspect.signature(host).bind(*args, **kwargs).arguments
        batch, device = given["batch"], given["latents"].device
        with no_grad_pass(), _same_draws(device):
            conds = [
                _rows_like(*both)
                for both in zip(self._encode_null(), given["text_encoder_conds"], strict=True)
            ]
        with no_grad_pass(), _same_draws(device):
            # is_train: sd-scripts would turn gradients on again. custom_attributes: it would
            # predict the rows that are preserved.
            others = {name: one for name, one in batch.items() if name != "custom_attributes"}
            changed = {"text_encoder_conds": conds, "batch": others, "is_train": False}
            null_pred, null_target, null_timesteps, _ = host(**{**given, **changed})
        if getattr(self, "is_swapping_blocks", False):
            given["accelerator"].unwrap_model(given["unet"]).prepare_block_swap_before_forward()
        pred, target, timesteps, weighting = host(*args, **kwargs)
        preserved = [
            bool(one.get("diff_output_preservation")) for one in batch.get("custom_attributes", [])
        ]
        if not torch.equal(timesteps, null_timesteps) or not (
            any(preserved) or torch.equal(target, null_target)
        ):
            raise RuntimeError(
                f"get_noise_pred_and_target: expected one that draws from torch and random alone, "
                f"as at commit {COMMIT[:7]} of sd-scripts, got other noise in the second pass."
            )
        unguided = undo_guidance(pred, null_pred, self.guidance_scale)
        if any(preserved):  # their target is the model's own prediction
            kept = torch.tensor(preserved, device=device).view(-1, *[1] * (pred.ndim - 1))
            unguided = torch.where(kept, pred.to(unguided.dtype), unguided)
        return unguided, target, timesteps, weighting


COMMIT = "48d368fa557731ad0488c07304dfeba8c07910eb"


def _empty_caption(models: Any, **masks: None) -> list[Tensor | None]:
    """One row of each of the text encoders' outputs: sd-scripts' negative prompt, never dropped."""
    from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

    tokenize = TokenizeStrategy.get_strategy()
    encoding = TextEncodingStrategy.get_strategy()
    ids = tokenize.tokenize("", **_accepted(tokenize.tokenize, is_negative=True))
    tokens = [one if one is None else one.to(_device(models)) for one in ids]
    options = _accepted(encoding.encode_tokens, enable_dropout=False, **masks)
    return list(encoding.encode_tokens(tokenize, models, tokens, **options))


def _accepted(function: Any, **options: Any) -> dict[str, Any]:
    """Those that this model's strategy takes."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def _device(models: Any) -> Any:
    return next(next(one.parameters()).device for one in models if one is not None)


def _rows_like(null: Tensor | None, cond: Any) -> Any:
    """The empty caption's row once for each of the batch's, in its place and dtype."""
    if null is None or cond is None:
        return None
    return null.to(cond.device, cond.dtype).expand(len(cond), *null.shape[1:])


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Leaves the random states of torch and of `random` as they were."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
