"""Run by `accelerate launch` in the tests: recipes one after the other, on CPU processes.

    accelerated.py RUNS.json

RUNS.json: a list of {"recipe", "flags", "kill", "environment"}; kill: the micro-step before which
the run ends as if it had been killed, or none; environment: of its engine. An error ends that run;
how each ended is in RUNS.told.
"""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import state as of_accelerate
from accelerate.utils import DistributedType

from run import loop

PATIENCE = 240
"""Seconds for a run; processes that wait for each other would do so for ever."""


def fsdp_on_the_cpu():
    """accelerate falls back to DDP where there is no GPU; FSDP2 itself runs there."""
    made = of_accelerate.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **settings):
        made(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            shared = of_accelerate.PartialState._shared_state
            shared["distributed_type"] = DistributedType.FSDP

    of_accelerate.AcceleratorState.__init__ = init


def deepspeed_on_the_cpu():
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first
    gloo = ("gloo", DistributedType.MULTI_CPU)
    of_accelerate.PartialState._prepare_backend = lambda *_: gloo
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    fit = loop.fit

    def fitted(accelerator, options):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 20  # else a tiny model is not sharded
        fit(accelerator, options)

    loop.fit = fitted


def run(recipe, flags, kill, environment):
    os.environ.update(environment)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    of_accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    of_accelerate.GradientState._reset_state()
    items = loop.Run._items

    def cut(*arguments):
        for number, item in enumerate(items(*arguments), start=1):
            if number == kill:
                raise KeyboardInterrupt
            yield item

    loop.Run._items = cut
    try:
        importlib.import_module(recipe).main(flags)
    except KeyboardInterrupt:
        return "killed"
    except (ValueError, RuntimeError, AssertionError, FloatingPointError) as error:
        if "SHOW" in os.environ:
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        loop.Run._items = items
    return "done"


def main():
    file = Path(sys.argv[1])
    fsdp_on_the_cpu()
    # The runs share their processes' group.
    of_accelerate.PartialState.destroy_process_group = lambda *_: None
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        deepspeed_on_the_cpu()
    told = [run(**one) for one in json.loads(file.read_text())]
    if os.environ["RANK"] == "0":
        file.with_suffix(".told").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
