"""What the host bench compares is the same step, done in other ways."""

import pytest

import bench_hosts


@pytest.mark.parametrize("host", list(bench_hosts.HOSTS))
def test_the_variants_of_a_host_have_one_loss(host):
    losses = {name: bench_hosts.make(host, name)() for name in bench_hosts.variants_of(host)}
    whole = losses["K = 4"]
    assert losses["K = 4, 8 samples a pass"] == pytest.approx(whole, rel=1e-4)
    assert losses.get("K = 4, winner again", whole) == pytest.approx(whole, rel=1e-4)
    assert 0 < losses["alone"] < whole and losses["K = 2"] != pytest.approx(whole, rel=1e-4)
