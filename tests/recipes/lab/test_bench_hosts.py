"""What the host bench compares is the same step, done in other ways."""

import pytest

from lab.bench import hosts as bench_hosts


@pytest.mark.parametrize("host", ["DPO", "SPO"])
def test_the_variants_of_a_host_have_one_loss(host, monkeypatch):
    monkeypatch.setattr(bench_hosts, "BATCH", 4)
    names = [name for name in bench_hosts.variants_of(host) if name != "K = 2"]
    losses = {name: bench_hosts.make(host, name)() for name in names}
    assert len(losses) == {"DPO": 4, "SPO": 3}[host]
    alone = losses.pop("alone")
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["K = 4"], rel=1e-4), name
        assert 0 < alone < loss


@pytest.mark.parametrize("host", ["Flow-GRPO", "DiffusionNFT"])
def test_with_a_rollout_the_variants_differ_by_what_is_added(host, monkeypatch):
    monkeypatch.setattr(bench_hosts, "BATCH", 2)
    losses = {name: bench_hosts.make(host, name)() for name in bench_hosts.variants_of(host)}
    assert len(losses) == 3 and losses["alone"] == bench_hosts.make(host, "alone")()
    assert losses["alone"] < min(losses["denoising"], losses["empty caption"])
    assert losses["denoising"] != losses["empty caption"]
