"""The feed-forward half of a block: gated or GELU, neurons sharded over the tensor axis.

The bias of the last projection is left to the residual addition, which follows.
"""

from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.parallel.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel
from megagrow.parallel.mesh import Mesh


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), gate and up fused neuron by neuron. Source: Shazeer, 2020 (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.tp = TensorParallel.of(mesh)
        sizes = model.hidden_size, 2 * model.ffn_size
        self.gate_up = ColumnParallelLinear(*sizes, model.mlp_bias, self.tp, operand=ops.gate_up_rows)
        self.down = RowParallelLinear(model.ffn_size, model.hidden_size, model.mlp_bias, self.tp)
        self.activate = {"swiglu": ops.swiglu, "geglu": ops.geglu}[model.activation]

    def forward(self, x_BSH: Tensor) -> Tensor:
        (gate_up,) = column_parallel(x_BSH, self.tp, self.gate_up)
        return self.down(self.activate(gate_up))


class GELU(nn.Module):
    """down(gelu(up(x))), with the tanh approximation, as in GPT-2, or exactly, as in BERT and GPT-NeoX."""

    def __init__(self, model: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.tp = TensorParallel.of(mesh)
        self.up = ColumnParallelLinear(model.hidden_size, model.ffn_size, model.mlp_bias, self.tp, adds_bias=False)
        self.down = RowParallelLinear(model.ffn_size, model.hidden_size, model.mlp_bias, self.tp)
        self.activate = {"gelu": ops.bias_gelu, "gelu_erf": ops.bias_gelu_erf}[model.activation]

    def forward(self, x_BSH: Tensor) -> Tensor:
        (up,) = column_parallel(x_BSH, self.tp, self.up)
        return self.down(self.activate(up, self.up.bias_operand(up.dtype)))


def make_mlp(model: ModelConfig, mesh: Mesh) -> GatedMLP | GELU:
    """The MLP that the configuration's activation names."""
    return GatedMLP(model, mesh) if model.is_gated else GELU(model, mesh)
