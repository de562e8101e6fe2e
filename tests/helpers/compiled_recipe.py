"""train_agsm.py, compiled without a C++ compiler; for a fresh process."""

import torch


def main(flags):
    import train_agsm

    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compiled(self, backend="aot_eager")
    train_agsm.main(flags)
