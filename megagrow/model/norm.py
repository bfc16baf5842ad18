"""RMSNorm and LayerNorm behind one module."""

# Shape suffix legend: B = batch, S = sequence, H = hidden.

import torch
from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.parallel.shards import local


class Norm(nn.Module):
    """The normalisation that the configuration names, with an optional residual addition before it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size)) if model.norm == "layer_norm" else None
        self.eps = model.norm_eps

    def forward(self, x_BSH: Tensor) -> Tensor:
        """norm(x)."""
        weight = local(self.weight).to(x_BSH.dtype)
        if self.bias is None:
            return ops.rms_norm(x_BSH, weight, self.eps)
        return ops.layer_norm(x_BSH, weight, local(self.bias).to(x_BSH.dtype), self.eps)

    def add(self, delta_BSH: Tensor, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + delta), x + delta): one pass over memory where a kernel is at hand."""
        weight = local(self.weight).to(x_BSH.dtype)
        if self.bias is None:
            return ops.rms_norm(delta_BSH, weight, self.eps, x_BSH)
        return ops.layer_norm(delta_BSH, weight, local(self.bias).to(x_BSH.dtype), self.eps, x_BSH)
