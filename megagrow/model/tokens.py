"""What the layers know about the tokens that they see, beside their activations."""

# Shape suffix legend: B = batch, S = this context rank's tokens, D = head_dim,
# L = tokens of the activations between sharded regions (S, or S / tp where they are cut along the sequence).

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megagrow.ops import DocumentMask


@dataclass(frozen=True)
class Tokens:
    """The tokens of one microbatch.

    Attributes:
        rotary: cosines and sines of their positions, [S, D] or, where samples differ in these, [B, S, D]; None without
            rotary positions.
        document_masks: see `context.document_masks`; None when attention crosses documents.
        dropout_keys_BL: see `dropout.token_keys`; None when nothing is dropped.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    document_masks: Sequence[DocumentMask] | None = None
    dropout_keys_BL: Tensor | None = None

    def in_layer(self, index: int) -> "Tokens":
        """The same tokens with dropout keys of a layer's own; each layer drops in two places."""
        if self.dropout_keys_BL is None:
            return self
        return replace(self, dropout_keys_BL=self.dropout_keys_BL + 2 * index)
