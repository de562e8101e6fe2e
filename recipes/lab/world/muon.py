"""Muon on the matrices of a model's blocks, AdamW on everything else, as one optimizer.

Muon (Jordan et al., 2024; `torch.optim.Muon`) orthogonalises the momentum of a matrix.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def in_blocks(model: nn.Module) -> list[nn.Parameter]:
    """The weights for Muon: of the linear layers and convolutions inside numbered blocks.

    First and last layers, embeddings and the layers that modulate norms are left to AdamW.
    """
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and re.search(r"\.\d+\.", name)
        and ".norm" not in name
        and module.weight.requires_grad
    ]


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """(out, in, h, w) -> (out, in * h * w), or (out, h * w * in) of one laid out channels last.

    A view. Muon does the same with either: it does not see the order of the columns.
    """
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), -1)


def _laid_out(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient in the weight's memory layout, in which torch nearly always makes it."""
    same = gradient.stride() == weight.stride()
    return gradient if same else torch.empty_like(weight).copy_(gradient)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on `in_blocks(model)`, `torch.optim.AdamW` on what else is trained.

    lr: of Muon, with updates of AdamW's size (`adjust_lr_fn="match_rms_adamw"`, Liu et al., 2025).
    A convolution (out, in, h, w) is the matrix (out, in * h * w) to it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        adamw_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.taken = in_blocks(model)
        self.matrices = [nn.Parameter(as_matrix(weight.detach())) for weight in self.taken]
        known = {id(weight) for weight in self.taken}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(
                self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            "adamw": torch.optim.AdamW(rest, lr=adamw_lr, betas=betas, weight_decay=weight_decay),
        }
        # The weights: a gradient scaler finds their gradients here, a schedule the rates.
        groups = [{"params": self.taken, "lr": lr}, {"params": rest, "lr": adamw_lr}]
        super().__init__(groups, {})

    def _pass_rates(self) -> None:
        for group, one in zip(self.param_groups, self.parts.values(), strict=True):
            one.param_groups[0]["lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both. The matrices are views of the weights, wherever these have moved."""
        self._pass_rates()
        for matrix, weight in zip(self.matrices, self.taken, strict=True):
            matrix.data = as_matrix(weight.detach())
            matrix.grad = None if weight.grad is None else as_matrix(_laid_out(weight.grad, weight))
        for one in self.parts.values():
            one.step()
        for matrix in self.matrices:
            matrix.grad = None

    def state_dict(self) -> dict[str, Any]:
        self._pass_rates()
        return {name: one.state_dict() for name, one in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, (name, one) in zip(self.param_groups, self.parts.items(), strict=True):
            one.load_state_dict(state_dict[name])
            group["lr"] = one.param_groups[0]["lr"]
