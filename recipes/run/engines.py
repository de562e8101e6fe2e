"""How a recipe runs in accelerate's engines: DDP, FSDP2 (`fsdp_version: 2`), DeepSpeed's ZeRO.

    check_launched(options, sharding=True)      before `Accelerator(...)`
    fit(accelerator, options)                   after it
    model, optimizer = accelerator.prepare(blocks_of(module, denoiser), optimizer)
    run_inside(model, lambda: pipe(...))        samples with weights that FSDP2 shards
    with gathered(model): ...                   saves them

FSDP2 and ZeRO-3 shard the weights: then every process makes every call of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

Result = TypeVar("Result")


def check_launched(options: Any, *, sharding: bool) -> None:
    """What accelerate's launcher and environment ask for, before anything is loaded.

    options: of `RunOptions`, which accelerate would overrule without a word.
    sharding: whether the recipe runs in FSDP2 and DeepSpeed too.

    Raises:
        ValueError: the recipe does not run so, or its options say otherwise.
    """
    fsdp, deepspeed = _asked("ACCELERATE_USE_FSDP"), _asked("ACCELERATE_USE_DEEPSPEED")
    if not sharding and (fsdp or deepspeed):
        raise ValueError(
            f"engine: expected one process or DDP, got {'FSDP' if fsdp else 'DeepSpeed'}, in which "
            "train_agsm.py, train_dpo.py and train_inpo.py run. Launch this command with "
            "--config_file recipes/configs/accelerate/ddp.yaml."
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "fsdp_version: expected 2, got 1, with which the EMA's and the reference's passes "
            "would run the model in training. Set fsdp_version: 2, as in "
            "recipes/configs/accelerate/fsdp2.yaml."
        )
    if fsdp and _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false, got true, with which only the first "
            "process would load the frozen text encoders. Set it to false."
        )
    for name in ("mixed_precision", "gradient_accumulation_steps"):
        given = str(getattr(options, name))
        launched = os.environ.get(f"ACCELERATE_{name.upper()}", given)
        if launched not in (given, "no"):  # "no" is the launcher's default
            raise ValueError(
                f"{name}: expected {launched}, as accelerate's launcher or the environment says, "
                f"got {given}. Give --{name} {launched}."
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            "dynamo_backend: expected no, got another from accelerate's launcher or the "
            "environment, which would compile more than the denoiser. Take --compile in its place."
        )


def fit(accelerator: Accelerator, options: Any) -> None:
    """Gives the engine the recipe's options, which rule.

    Raises:
        ValueError: DeepSpeed's config has another value.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        # Its policy would round the timesteps to bfloat16. Autocast computes in it anyway.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for key, name in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("gradient_clipping", "max_grad_norm"),
        ("train_micro_batch_size_per_gpu", "train_batch_size"),
    ):
        given, wanted = config.get(key, "auto"), getattr(options, name)
        if given not in ("auto", wanted):
            raise ValueError(
                f"{key} of DeepSpeed's config: expected --{name} ({wanted}), got {given}. Leave "
                f"it out of the config, or give --{name} {given}."
            )
        config[key] = wanted
    unset_hf_deepspeed_config()  # transformers would shard the frozen text encoders too


def is_sharded(state: Accelerator | PartialState) -> bool:
    """Whether a process holds a part of each weight only."""
    if state.distributed_type == DistributedType.DEEPSPEED:
        return bool(AcceleratorState().deepspeed_plugin.zero_stage == 3)
    return bool(state.distributed_type == DistributedType.FSDP)


def blocks_of(module: nn.Module, denoiser: Any) -> nn.Module:
    """The module; FSDP2's TRANSFORMER_BASED_WRAP will shard it by diffusers' list of blocks."""
    present = {type(one).__name__ for one in denoiser.modules()}
    module._no_split_modules = [
        name for name in denoiser._no_split_modules or () if name in present
    ]
    return module


def run_inside(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Runs what calls parts of a model, a pipeline say, as a forward pass of all of it.

    FSDP2 has then gathered what belongs to no block.
    """
    if not isinstance(model, FSDPModule):
        return function()
    if not hasattr(model, "run"):
        model.run = lambda inner: inner()
        register_fsdp_forward_method(model, "run")
    result: Result = model.run(function)
    return result


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The trained parameters are whole inside, on the main process. Every process enters it.

    With FSDP2 they lie on the CPU there.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    if any(hasattr(one, "ds_tensor") for one in trained):
        import deepspeed

        with deepspeed.zero.GatheredParameters(trained):
            yield
        return
    reshard(model)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                whole = parameter.full_tensor()
                if PartialState().is_main_process:
                    owner._parameters[name] = nn.Parameter(whole.detach().cpu())
                    replaced.append((owner, name, parameter))
    try:
        yield
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter


def reshard(model: nn.Module) -> None:
    """FSDP2's modules have their shards as parameters again, also after a forward pass alone."""
    for one in model.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard."""
    if hasattr(parameter, "ds_tensor"):
        shard: Tensor = parameter.ds_tensor
        return shard
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
