"""The EMA, references and the regularizer in DDP, FSDP2 and DeepSpeed, on two CPU processes.

Exact means: no difference at all from one process that holds the same weights and averages.
"""

import functools
import importlib.util

import engines
import pytest
from ranks import run_ranks

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
)
ZERO = ["zero1", "zero2", "zero3"]
FAMILIES = {"torch": ["ddp", "fsdp2"], "deepspeed": ZERO}
EVERY = ["ddp", "fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ZERO)]
STEPS = {  # kind of weights, captions, settings
    "a host's graph": ("lora", "none", {"reuse": True}),
    "all weights": ("full", "none", {}),
    "chunks": ("lora", "fewer", {"chunk_size": 2}),
    "chunks and a host's graph": ("full", "fewer", {"chunk_size": 2, "reuse": True}),
    "backward": ("lora", "fewer", {"chunk_size": 2, "immediate": True}),
    "backward of all weights": ("full", "none", {"chunk_size": 2, "immediate": True}),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """`told(engine, label)`: what the ranks found; all cases of a family run in one go."""
    folder = tmp_path_factory.mktemp("states")

    @functools.cache
    def family(which):
        cases = {}
        for name in FAMILIES[which]:
            for kind in ("tokens", "lora", "full"):
                cases[name, kind] = (engines.averages, (name, kind), {})
                cases[name, kind, "first"] = (engines.averages, (name, kind, True), {})
            for label, (kind, captions, settings) in STEPS.items():
                if not (name in ZERO and "immediate" in settings):
                    cases[name, label] = (engines.steps, (name, kind, captions), settings)
            cases[name, "drawn apart"] = (engines.drawn_apart, (name,), {})
            cases[name, "reference"] = (engines.reference, (name,), {})
            cases[name, "adapters"] = (engines.adapters, (name,), {})
            path = str(folder / f"{name}.pt")
            cases[name, "saved"] = (engines.saved, (name, path), {})
            cases[name, "loaded"] = (engines.loaded, (name, path), {})
            if name in ZERO:
                cases[name, "no backward"] = (engines.no_backward, (name,), {})
        if which == "torch":
            cases["fsdp1"] = (engines.fsdp1, (), {})
            cases["parameters alone"] = (engines.parameters_alone, (), {})
        return run_ranks(engines.many, 2, cases)

    def of(*label, world_size=2):
        name = label[0]
        which = "deepspeed" if name in ZERO else "torch"
        ranks = family(which)
        if world_size != 2:
            path = str(folder / f"{name}.pt")
            return [*run_ranks(engines.loaded, world_size, name, path).values()]
        key = label if len(label) > 1 else label[0]
        failed = {k: found for k, found in ranks[0].items() if str(found).startswith("failed")}
        assert key in ranks[0] and key not in failed, failed
        return [rank[key] for rank in ranks.values()]

    return of


def exact(found):
    assert found["student"] == found["average"] == 0
    return found["between"]


def test_fsdp2_in_short():
    for found in run_ranks(engines.averages, 2, "fsdp2", "lora").values():
        assert exact(found["trained"]) > 1e-4 and found["graph"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("order", [(), ("first",)], ids=["after", "before the engine"])
@pytest.mark.parametrize("kind", ["tokens", "lora", "full"])
@pytest.mark.parametrize("engine", EVERY)
def test_averages_are_exact(told, engine, kind, order):
    for found in told(engine, kind, *order):
        assert exact(found["start"]) == 0
        assert exact(found["trained"]) > 1e-4
        assert exact(found["trained again"]) > 1e-4
        assert found["graph"] < 1e-6
        assert found["state"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("engine", EVERY)
def test_steps_equal_one_process_with_all_batches(told, engine, case):
    """Also where a rank has fewer candidates, or none: then every rank makes as many calls."""
    if engine in ZERO and "immediate" in STEPS[case][2]:
        assert all("no backward with DeepSpeed" in one for one in told(engine, "no backward"))
        return
    first, second = told(engine, case)
    assert first["calls"] == second["calls"]
    for found in (first, second):
        assert found["loss"] < 1e-6 and found["gradient"] < 1e-6 < min(found["size"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERY)
def test_ranks_that_drew_other_weights_before(told, engine):
    for found in told(engine, "drawn apart"):
        if engine == "fsdp2":
            assert "Make the EMA after fully_shard" in found
        else:
            assert exact(found) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERY)
def test_references(told, engine):
    for found in told(engine, "reference"):
        assert found["given"] == 0 < found["moved"]
    for found in told(engine, "adapters"):
        assert found["reference"] == [0, 0] and min(found["moved"]) > 0
        assert max(found["gradient"]) < 1e-6 and found["others"] == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERY)
def test_states_are_whole_and_load_anywhere(told, engine):
    first, second = told(engine, "saved")
    assert first == 0 and second == (engine in ("fsdp2", "zero3"))
    for found in told(engine, "loaded"):
        assert exact(found) > 1e-4
        assert "expected the first process's" in found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize("world_size", [1, 4])
def test_states_load_in_other_numbers_of_processes(told, engine, world_size):
    for found in told(engine, "loaded", world_size=world_size):
        assert exact(found) > 1e-4


@pytest.mark.slow
def test_fsdp1_is_refused(told):
    for found in told("fsdp1"):
        assert len(found) == 8
        assert all("Use FSDP2" in message for message in found.values()), found


@pytest.mark.slow
def test_parameters_without_their_module(told):
    for found in told("parameters alone"):
        assert "Pass the module: EMA(denoiser)" in found["no module"]
        assert exact(found["regularizer"]) > 1e-4
        assert "before fully_shard" in found["before"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_compiled(engine):
    for found in run_ranks(engines.compiled, 2, engine).values():
        assert found["student"] < 1e-6 and found["average"] < 1e-6 < found["between"]
