"""What stands between an encoder's last layer and its output matrix."""

# Shape suffix legend: B = batch, L = tokens of the activations between sharded regions, H = hidden.

from torch import Tensor, nn

from megagrow import ops
from megagrow.config import ModelConfig
from megagrow.model.norm import Norm
from megagrow.parallel.layers import Linear, TensorParallel
from megagrow.parallel.shards import local


class MLMHead(nn.Module):
    """norm(gelu(dense(x))), computed token by token, by each rank for the tokens that it holds.

    GELU is exact where the MLP's is, else in its tanh approximation.

    Source: BERT (Devlin et al., 2018, arXiv 1810.04805), as its authors' code has it.
    """

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.dense = Linear(model.hidden_size, model.hidden_size, True, tp)
        self.activate = ops.bias_gelu_erf if model.activation == "gelu_erf" else ops.bias_gelu
        self.norm = Norm(model)

    def forward(self, x_BLH: Tensor) -> Tensor:
        y_BLH = self.dense.tp.linear(x_BLH, local(self.dense.weight).to(x_BLH.dtype))
        return self.norm(self.activate(y_BLH, self.dense.bias_operand(x_BLH.dtype)))
