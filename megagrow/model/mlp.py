"""The feed-forward half of a block: SwiGLU or GELU, neurons sharded over the tensor axis."""

from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.parallel.collectives import copy_to
from megagrow.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megagrow.parallel.mesh import Axis


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up fused neuron by neuron. Source: Shazeer, 2020 (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(model.hidden_size, 2 * model.ffn_size, model.bias, tp)
        self.down = RowParallelLinear(model.ffn_size, model.hidden_size, model.bias, tp)
        self.tp = tp

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate_up(copy_to(x_BSH, self.tp))))


class GELU(nn.Module):
    """down(gelu(up(x))) with the tanh approximation, as in GPT-2."""

    def __init__(self, model: ModelConfig, tp: Axis) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(model.hidden_size, model.ffn_size, model.bias, tp)
        self.down = RowParallelLinear(model.ffn_size, model.hidden_size, model.bias, tp)
        self.tp = tp

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(copy_to(x_BSH, self.tp))))


def make_mlp(model: ModelConfig, tp: Axis) -> nn.Module:
    """The MLP that the configuration's activation names."""
    return SwiGLU(model, tp) if model.activation == "swiglu" else GELU(model, tp)
