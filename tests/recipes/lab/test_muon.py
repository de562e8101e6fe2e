"""Muon beside AdamW: who gets what, equality with torch's own, schedules and checkpoints."""

import copy

import pytest
import torch
from torch import nn

from lab.world import architectures
from lab.world.muon import MuonAdamW, in_blocks

RATES = {"lr": 0.01, "adamw_lr": 0.002, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm1 = nn.Linear(4, 4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.norm1(self.conv(x).mean((2, 3))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.conv_out = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv_out(self.blocks[0](x)[..., None, None]).square().sum()


def net():
    torch.manual_seed(0)
    return Net()


def train(model, optimizer, steps, schedule=None):
    for step in range(steps):
        data = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(data).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize(
    ("layout", "atol"), [(torch.contiguous_format, 0), (torch.channels_last, 2e-4)]
)
def test_it_is_torchs_muon_on_flattened_blocks_and_adamw_on_the_rest(layout, atol):
    model, twin = net().to(memory_format=layout), net()
    optimizer = MuonAdamW(model, **RATES)
    conv, linear = twin.blocks[0].conv.weight, twin.blocks[0].linear.weight
    flat = nn.Parameter(conv.detach().flatten(1).clone())
    muon = torch.optim.Muon(
        [flat, linear], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    rest = [p for p in twin.parameters() if p is not conv and p is not linear]
    adamw = torch.optim.AdamW(rest, lr=0.002, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        data = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(data).backward()
        optimizer.step()
        optimizer.zero_grad()
        twin(data).backward()
        flat.grad = conv.grad.flatten(1)
        muon.step()
        adamw.step()
        twin.zero_grad()
        with torch.no_grad():
            conv.copy_(flat.view_as(conv))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, twin.get_parameter(name), atol=atol, rtol=0)


def test_a_schedule_and_a_checkpoint_reach_both_parts():
    whole = net()
    optimizer = MuonAdamW(whole, **RATES)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(whole, optimizer, 2, fall)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx(
        [0.002 / 3, 0.01 / 3]
    )
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), fall.state_dict()))
    train(whole, optimizer, 2, fall)

    cut = net()
    resumed = MuonAdamW(cut, **RATES)
    again = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1 / (1 + step))
    cut.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    train(cut, resumed, 2, again)
    assert all(torch.equal(v, cut.get_parameter(n)) for n, v in whole.named_parameters())


def test_a_gradient_scaler_sees_every_gradient():
    model, twin = net(), net()
    plain, scaled = MuonAdamW(twin, **RATES), MuonAdamW(model, **RATES)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    twin(data).backward()
    scaler.scale(model(data)).backward()
    scaler.unscale_(scaled)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, twin.get_parameter(name).grad)
    plain.step()
    scaler.step(scaled)
    scaler.update()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())

    scaled.zero_grad()
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(data)).backward()
    model.blocks[0].conv.weight.grad[0, 0, 0, 0] = float("inf")
    scaler.step(scaled)  # an overflow in a block leaves everything as it was
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_weights_that_moved_are_still_trained():
    model = net()
    optimizer = MuonAdamW(model, **RATES)
    for parameter in model.parameters():  # as module.to(device) does
        parameter.data = parameter.data.clone()
    before = model.blocks[0].conv.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.blocks[0].conv.weight, before)


@pytest.mark.parametrize("base", ["flow", "epsilon"])
def test_what_it_takes_of_the_bases(base):
    model = architectures.BASES[base](width=32, layers=1)
    taken = {id(weight) for weight in in_blocks(model)}
    names = [name for name, p in model.named_parameters() if id(p) in taken]
    assert any("encoder.layers.0" in name for name in names)
    assert any("denoiser" in name and ".attn" in name for name in names)
    assert not any("norm" in name or "embed" in name for name in names)
    assert not any(name.endswith((".conv_in.weight", "conv_out.weight")) for name in names)
