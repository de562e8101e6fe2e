"""AGSM in DiffSynth-Studio (modelscope/DiffSynth-Studio), for every model whose task is `sft`.

In the model's train.py, after `model = ...TrainingModule(...)`:

    from agsm_loss.integrations.trainers.diffsynth_studio import train_guidance
    train_guidance(model, guidance_scale=3)

DiffSynth-Studio chooses a loss from `task_to_loss` and predicts with `pipe.model_fn`. Its losses
stay as they are; while one runs, `model_fn` also predicts under the negative prompt, without
gradient, and returns the prediction with guidance undone. Ideogram 4 does so with a second network,
if `--model_id_with_origin_paths` has its `unconditional_transformer`, after the first.

>>> import torch
>>> from types import SimpleNamespace
>>> from agsm_loss.integrations.trainers.diffsynth_studio import train_guidance
>>> def loss(pipe, shared, posi, nega):  # DiffSynth-Studio's, with the target 0
...     return pipe.model_fn(**shared, **posi).square().mean()
>>> module = SimpleNamespace(
...     task_to_loss={"sft": loss, "sft:data_process": None},
...     get_pipeline_inputs=lambda data: ({"cfg_scale": 1}, {"prompt": data}, {}),
... )
>>> train_guidance(module, guidance_scale=2)
>>> module.get_pipeline_inputs("a cat")
({'cfg_scale': 2}, {'prompt': 'a cat'}, {'prompt': '', 'negative_prompt': ''})
>>> pipe = SimpleNamespace(model_fn=lambda latents, text: latents * text)
>>> inputs = {"latents": torch.ones(2)}, {"text": torch.tensor(3.0)}, {"text": torch.tensor(1.0)}
>>> module.task_to_loss["sft"](pipe, *inputs)  # (3 + 1)/2, squared
tensor(4.)
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from agsm_loss import _checks
from agsm_loss.functional import undo_guidance
from agsm_loss.integrations.denoisers import no_grad_pass


def train_guidance(module: Any, guidance_scale: float | int) -> None:
    """Replace the losses of the tasks `sft` and `sft:train` by AGSM, and encode negative prompts.

    Call it in every stage of split training, `sft:data_process` too, which caches the encoded
    prompts.

    Args:
        module: a `DiffusionTrainingModule`, before it is given to `accelerator.prepare`.
        guidance_scale: s ≥ 1, the scale that you would sample with. 1 changes nothing.

    Raises:
        ValueError: a scale below 1; a module without an `sft` task. In training: a pipeline that
            does not encode a negative prompt.
    """
    _checks.check_guidance_scale(guidance_scale)
    losses = getattr(module, "task_to_loss", {})
    tasks = [task for task in ("sft", "sft:train") if task in losses]
    if not tasks:
        raise ValueError(
            "module: expected a DiffusionTrainingModule of DiffSynth-Studio whose task_to_loss has "
            f"sft, got a {type(module).__name__} with {sorted(losses)}."
        )
    for task in tasks:
        losses[task] = _guided(losses[task], guidance_scale)
    if guidance_scale != 1:
        module.get_pipeline_inputs = _with_negative_prompt(module.get_pipeline_inputs)


def _with_negative_prompt(get_pipeline_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Its inputs, so that the pipeline's units encode the negative prompt."""

    def inputs(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        shared, posi, nega = get_pipeline_inputs(*args, **kwargs)
        # Any scale but 1: the units read nothing else from it.
        shared = {**shared, "cfg_scale": 2}
        nega = {"negative_prompt": "", **nega}
        return shared, posi, {"prompt": nega["negative_prompt"], **nega}  # SDXL's name for it

    return inputs


def _guided(loss: Callable[..., Tensor], guidance_scale: float | int) -> Callable[..., Tensor]:
    """DiffSynth-Studio's loss, of predictions with guidance undone."""

    def guided_loss(pipe: Any, shared: dict[str, Any], posi: Any, nega: Any) -> Tensor:
        if guidance_scale == 1:
            return loss(pipe, shared, posi, nega)
        _check_negative_prompt(posi, nega)
        model_fn = pipe.model_fn

        def unguided(**inputs: Any) -> Any:
            pred = model_fn(**inputs)
            others = {name: one for name, one in inputs.items() if name not in posi}
            if getattr(pipe, "dit_uncond", None) is not None:  # Ideogram 4's sampler uses it
                others["dit"] = pipe.dit_uncond
            with no_grad_pass():
                null_pred = model_fn(**{**others, **nega})
            if isinstance(pred, Tensor):
                return undo_guidance(pred, null_pred, guidance_scale)
            return tuple(  # video and audio
                undo_guidance(*both, guidance_scale) for both in zip(pred, null_pred, strict=True)
            )

        pipe.model_fn = unguided
        try:
            return loss(pipe, shared, posi, nega)
        finally:
            pipe.model_fn = model_fn

    return guided_loss


def _check_negative_prompt(posi: Mapping[str, Any], nega: Mapping[str, Any]) -> None:
    encoded = {name: found for name, one in posi.items() if (found := _tensors(one))}
    missing = sorted(set(encoded) - set(nega))
    if missing:
        raise ValueError(
            f"inputs_nega: expected {sorted(encoded)}, as in inputs_posi, got no {missing}: this "
            "pipeline encodes no negative prompt."
        )
    alike = all(
        len(found) == len(other := _tensors(nega[name]))
        and all(
            a.shape == b.shape and bool((a == b).all()) for a, b in zip(found, other, strict=True)
        )
        for name, found in encoded.items()
    )
    if alike:
        warnings.warn(
            "inputs_nega: expected the encoded negative prompt, got what the prompt is encoded to: "
            "this image trains on plain denoising. If its prompt is not empty, run the task "
            "sft:data_process again, with train_guidance.",
            stacklevel=3,
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
