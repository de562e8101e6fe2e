"""Gradient checkpointing runs a block's hooks again in the backward pass."""

import pytest
import torch
from integrations_tiny import NAMES, run, tiny
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from agsm_loss import Bank
from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens


def two_forwards(made, tokens, attached):
    """Gradients of calls with other banks and timesteps, run backward together; last bank off."""
    outs = []
    for bank, t in (([0, 1], 37.0), ([1, 1], 905.0), ([-1, 0], 400.0)):
        x = made.inputs(timestep=t)
        for name in {"sample", "hidden_states", "x", "cap_feats"} & set(x):  # for use_reentrant
            tree_map(torch.Tensor.requires_grad_, x[name])
        with attached.using(bank):
            outs.append(run(made.model, **x))
    loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outs))
    tokens.zero_grad()
    with attached.using(Bank.OFF):
        loss.backward()
    return [p.grad.clone() for p in tokens.parameters()]


def enable(model, use_reentrant):
    def run(module, *args):
        return checkpoint(module, *args, use_reentrant=use_reentrant)

    model.train()
    if use_reentrant:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=run)
    else:
        model.enable_gradient_checkpointing()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_same_gradients(name, use_reentrant, attach_first):
    made = tiny(name)
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
    attached = attach_soft_tokens(made.model, tokens)
    expected = two_forwards(made, tokens, attached)
    if not attach_first:
        attached.detach()
    enable(made.model, use_reentrant)
    if not attach_first:
        attached = attach_soft_tokens(made.model, tokens)
    ours = two_forwards(made, tokens, attached)
    attached.detach()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_test_can_fail():
    """The obvious way, a hook that reads a current bank, is wrong under checkpointing, silently."""
    made = tiny("sd3")
    tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
    current = {}

    class Naive:
        def using(self, bank):
            current["bank"] = torch.tensor(bank) if isinstance(bank, list) else bank
            return torch.enable_grad()

    for layer, block in enumerate(made.model.transformer_blocks):

        def before(module, args, kwargs, layer=layer):
            bank = current["bank"] if isinstance(current["bank"], torch.Tensor) else torch.zeros(2)
            own = tokens(current["t"], bank.clamp(min=0).long())[:, layer]
            if args:
                return (args[0], torch.cat([args[1], own], dim=1), *args[2:]), kwargs
            text = torch.cat([kwargs["encoder_hidden_states"], own], dim=1)
            return args, kwargs | {"encoder_hidden_states": text}

        def after(module, args, output):
            return (None if output[0] is None else output[0][:, :-2], output[1])

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
    made.model.register_forward_pre_hook(
        lambda m, a, k: current.update(t=k["timestep"]), with_kwargs=True
    )
    expected = two_forwards(made, tokens, Naive())
    enable(made.model, use_reentrant=False)
    ours = two_forwards(made, tokens, Naive())
    error = (ours[0] - expected[0]).norm() / expected[0].norm()
    assert error > 0.1
