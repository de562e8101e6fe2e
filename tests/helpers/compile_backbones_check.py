"""Compiled denoisers with tokens attached; for a fresh process.

The backend "eager" stops at the graph; recipes/test_train_agsm.py compiles a run with its backward.
"""

import torch
from integrations_tiny import run, tiny

from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens

COMPILED = ("unet", "sd3", "flux", "qwen", "sana", "z_image")  # flux2: as flux


def main():
    for name in COMPILED:
        torch.compiler.reset()
        made = tiny(name)
        tokens = make_soft_tokens(made.model, num_tokens=2, std=1.0).double()
        attached = attach_soft_tokens(made.model, tokens)
        compiled = torch.compile(made.model, backend="eager", fullgraph=True)
        split = [[-1, 1]] if name == "sd3" else []
        for bank in (torch.tensor([1, 0]), *split):
            x = made.inputs()
            with attached.using(bank):
                eager, ours = run(made.model, **x), run(compiled, **x)
            torch.testing.assert_close(ours, eager)
            grads = [torch.autograd.grad(o.square().sum(), tokens.tokens)[0] for o in (ours, eager)]
            torch.testing.assert_close(*grads)
        print(name)
