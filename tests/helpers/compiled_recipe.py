"""Run by test_train_agsm.py in its own process: train_agsm.py, compiled without a C++ compiler."""

import sys
from pathlib import Path

import torch


def main():
    sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
    import train_agsm

    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compiled(self, backend="aot_eager")
    train_agsm.main()


if __name__ == "__main__":
    main()
