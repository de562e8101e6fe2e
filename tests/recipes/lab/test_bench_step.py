"""What the step bench compares is the same step, done in other ways."""

from types import SimpleNamespace

import pytest
import torch
from pipelines_tiny import speaking_pipeline

from lab.bench import step as bench_step


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Makes a tiny model of a released one's class stand for sd15; none is kept from a test."""

    def stand_in(name):
        found = bench_step.configs(str(speaking_pipeline(name, tmp_path / "p")))
        options = bench_step.OPTIONS.make(resolution=8)
        monkeypatch.setattr(bench_step, "OPTIONS", SimpleNamespace(make=lambda: options))
        monkeypatch.setattr(bench_step, "configs", lambda _: dict(found))

    bench_step.network.cache_clear()
    yield stand_in
    bench_step.network.cache_clear()


@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_the_arrangements_have_the_published_loss(name, small, monkeypatch):
    """At the first step, and after it, when tokens and EMA have moved."""
    small(name)
    few = bench_step.Passes(chunk_size=2), bench_step.Passes(2, backward=torch.Tensor.backward)
    names = bench_step.ARRANGEMENTS
    for chunked, passes in zip(("chunks of 8", "memory-flat, 8"), few, strict=True):
        monkeypatch.setitem(names, chunked, (names[chunked][0], passes))
    losses = {}
    for arrangement in bench_step.NAMES:
        run = bench_step.make("sd15", arrangement, 3, batch=3)
        losses[arrangement] = [run().item() for _ in range(2)]
    published = losses.pop("published")
    assert published[0] != published[1]
    assert max(losses.pop("gamma- = 0")) < min(published)
    fewer = losses.pop("one negative")
    assert fewer != pytest.approx(published, rel=1e-4)
    assert fewer == pytest.approx(published, rel=0.5)
    assert len(losses) == 4
    for arrangement, values in losses.items():
        assert values == pytest.approx(published, rel=1e-4), arrangement


def test_the_table_and_what_does_not_fit(small, monkeypatch, capsys):
    small("unet")
    peaks, made = iter([20.0, *[10.0] * 5]), bench_step.make

    def make(model, arrangement, *args, **settings):
        if arrangement == "one negative":
            raise torch.OutOfMemoryError
        return made(model, arrangement, *args, **settings)

    monkeypatch.setattr(bench_step, "make", make)
    monkeypatch.setattr(bench_step, "peak_on_cpu", lambda *_: next(peaks))
    bench_step.main(["--rounds", "2", "--models", "sd15", "--candidates", "2"])
    first, *lines = capsys.readouterr().out.splitlines()[-1 - len(bench_step.NAMES) :]
    assert first == "one thread, float32; 2 rounds in turns"
    assert "published" in lines[0] and "MiB, 1.00" in lines[0]
    assert "exact" in lines[1] and "MiB, 0.50" in lines[1]
    told = {name: line.count("nan") for name, line in zip(bench_step.NAMES, lines, strict=True)}
    assert told.pop("one negative") >= 3 and set(told.values()) == {0}


@pytest.mark.slow
def test_the_peak_is_that_of_the_step():
    """Of what autograd keeps, and less than twice that."""
    run, kept = bench_step.make("flow", "exact", 4), {}
    network, _ = bench_step.network("flow", "cpu", torch.float32)
    weights = {one.untyped_storage().data_ptr() for one in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    held = sum(one.nbytes() for one in kept.values()) / 2**20
    peak = bench_step.peak_on_cpu("flow", "exact", 4, [])
    assert held < peak < 2 * held, (held, peak)


@pytest.mark.parametrize("name", ["unet_sdxl", "flux"])
def test_a_released_model_takes_the_same_step(name, small):
    """On a tiny model of its class."""
    small(name)
    losses = []
    for arrangement in ("published", "exact"):
        run = bench_step.make("sd15", arrangement, 2, batch=2)
        losses.append([run().item() for _ in range(4)])
    assert losses[0][0] != pytest.approx(losses[0][3], rel=2e-6)
    assert losses[1] == pytest.approx(losses[0], rel=5e-7)
