"""What a run goes on from: what is trained, its optimizer, other state, random numbers.

    state = RunState(accelerator, model, optimizer, [schedule, log, host])
    state.save(folder)
    state.load(folder)

Weights and the optimizer's state are saved whole, by name, and load in any number of processes
and in any engine but DeepSpeed. That writes files of its own, for as many processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import (
    load_accelerator_state,
    load_custom_state,
    save_accelerator_state,
    save_custom_state,
)
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from run.engines import bare, reshard

WEIGHTS, OPTIMIZER = "trainable.safetensors", "optimizer.bin"


class RunState:
    """`model` and `optimizer` come prepared. Of the model only what is trained is saved.

    others: objects with `state_dict` and `load_state_dict`; the main process's are saved.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, others: Sequence[Any]
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.others = others
        self.tag = ""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            stage = accelerator.state.deepspeed_plugin.zero_stage
            self.tag = f"zero{stage}_of_{accelerator.num_processes}"

    def save(self, folder: Path) -> None:
        """Every process calls it."""
        accelerator = self.accelerator
        folder.mkdir(parents=True, exist_ok=True)
        if self.tag:
            engine: Any = self.model
            engine.save_checkpoint(str(folder), self.tag, exclude_frozen_parameters=True)
        else:
            reshard(self.model)
            whole = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            optimizer = self.optimizer.optimizer
            weights = get_model_state_dict(self.model, options=whole)
            if _has_torchs_state(optimizer):
                state = get_optimizer_state_dict(self.model, optimizer, options=whole)
            else:
                state = optimizer.state_dict()
            if accelerator.is_main_process:
                own = {name: weights[name].contiguous() for name in self._trained()}
                save_file(own, folder / WEIGHTS)
                torch.save(state, folder / OPTIMIZER)
        save_accelerator_state(
            str(folder),
            model_states=[],
            optimizers=[],
            schedulers=[],
            dataloaders=[],
            process_index=accelerator.process_index,
            step=accelerator.step,
            scaler=accelerator.scaler,
        )
        for number, one in enumerate(self.others):
            save_custom_state(one, str(folder), number)

    def load(self, folder: Path) -> None:
        """Every process calls it.

        Raises:
            ValueError: another engine or other options wrote it.
        """
        found = next((one.name for one in folder.glob("zero*_of_*")), "")
        if found != self.tag:
            names = [name or "no DeepSpeed" for name in (found, self.tag)]
            raise ValueError(
                f"{folder}: expected the engine that wrote it ({names[0]}: ZeRO's stage and the "
                f"number of processes), got {names[1]}. Resume with the --config_file and "
                "--num_processes that the run began with."
            )
        if self.tag:
            engine: Any = self.model
            engine.load_checkpoint(str(folder), self.tag, load_module_strict=False)
        else:
            self._load_whole(folder)
        load_accelerator_state(
            str(folder),
            models=[],
            optimizers=[],
            schedulers=[],
            dataloaders=[],
            process_index=self.accelerator.process_index,
            scaler=self.accelerator.scaler,
            map_location="cpu",
        )
        for number, one in enumerate(self.others):
            load_custom_state(one, str(folder), number)

    def _load_whole(self, folder: Path) -> None:
        weights, own = load_file(folder / WEIGHTS), self._trained()
        if weights.keys() != set(own):
            raise ValueError(
                f"{folder}: expected parameters {sorted(own)}, got {sorted(weights)}. Resume with "
                "the options that the run began with."
            )
        reshard(self.model)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, weights, options=whole)
        state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer = self.optimizer.optimizer
        if _has_torchs_state(optimizer):
            set_optimizer_state_dict(self.model, optimizer, state, options=whole)
        else:
            optimizer.load_state_dict(state)

    def _trained(self) -> list[str]:
        return [name for name, one in bare(self.model).named_parameters() if one.requires_grad]


def _has_torchs_state(optimizer: torch.optim.Optimizer) -> bool:
    """Not so of an optimizer of several, such as `lab.world.muon`'s: its state is its own."""
    return {"state", "param_groups"} <= optimizer.state_dict().keys()
