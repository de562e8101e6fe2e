"""What the step bench compares is the same step, done in other ways."""

import pytest
import torch
from pipelines_tiny import speaking_pipeline

from lab.bench import step as bench_step


@pytest.mark.parametrize("model", ["flow", pytest.param("epsilon", marks=pytest.mark.slow)])
def test_the_arrangements_have_the_published_loss(model, monkeypatch):
    """At the first step, and after it, when tokens and EMA have moved."""
    few = bench_step.Passes(chunk_size=2), bench_step.Passes(2, backward=torch.Tensor.backward)
    names = bench_step.ARRANGEMENTS
    for name, passes in zip(("chunks of 8", "memory-flat, 8"), few, strict=True):
        monkeypatch.setitem(names, name, (names[name][0], passes))
    losses = {}
    for name in bench_step.NAMES:
        run = bench_step.make(model, name, 3, batch=3)
        losses[name] = [run().item() for _ in range(2)]
    published = losses.pop("published")
    assert published[0] != published[1]
    assert max(losses.pop("gamma- = 0")) < min(published)
    fewer = losses.pop("one negative")
    assert fewer != pytest.approx(published, rel=1e-4)
    assert fewer == pytest.approx(published, rel=0.5)
    assert len(losses) == 4
    for name, values in losses.items():
        assert values == pytest.approx(published, rel=1e-4), name


def test_the_table(monkeypatch, capsys):
    peaks = iter([20.0, *[10.0] * 6])
    monkeypatch.setattr(bench_step, "peak_on_cpu", lambda *_: next(peaks))
    bench_step.main(["--rounds", "2", "--models", "flow", "--candidates", "2"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "one thread, float32; 2 rounds in turns"
    assert len(lines) == len(bench_step.NAMES)
    assert "published" in lines[0] and "MiB, 1.00" in lines[0]
    assert "exact" in lines[1] and "MiB, 0.50" in lines[1]


@pytest.mark.slow
def test_the_peak_is_that_of_the_step():
    exact, fewer = (bench_step.peak_on_cpu("flow", one, 4, []) for one in ("exact", "gamma- = 0"))
    assert 0 < 1.5 * fewer < exact


@pytest.fixture
def no_network():
    """None is kept from another test, nor for one."""
    bench_step.network.cache_clear()
    yield
    bench_step.network.cache_clear()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["unet", "unet_sdxl", "sd3", "flux"])
def test_a_released_model_takes_the_same_step(name, tmp_path, monkeypatch):
    """On a tiny model of its class."""
    small = bench_step.configs(str(speaking_pipeline(name, tmp_path / "p")))
    monkeypatch.setattr(bench_step, "configs", lambda _: dict(small))
    losses = []
    for arrangement in ("published", "exact"):
        run = bench_step.make("sd15", arrangement, 2, batch=2)
        losses.append([run().item() for _ in range(4)])
    assert losses[0][0] != pytest.approx(losses[0][3], rel=2e-6)
    assert losses[1] == pytest.approx(losses[0], rel=5e-7)


def test_what_does_not_fit_is_told(monkeypatch, capsys):
    made = bench_step.make

    def make(model, arrangement, *args, **settings):
        if arrangement == "exact":
            raise torch.OutOfMemoryError
        return made(model, arrangement, *args, **settings)

    monkeypatch.setattr(bench_step, "make", make)
    monkeypatch.setattr(bench_step, "peak_on_cpu", lambda *_: 10.0)
    bench_step.main(["--rounds", "2", "--models", "flow", "--candidates", "2"])
    told = [line.count("nan") for line in capsys.readouterr().out.splitlines()]
    assert told[1] == 0 and told[2] >= 3 and sum(told) == told[2]
