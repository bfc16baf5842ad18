"""Depth methods: which source layer each target layer copies, and which layers begin as the identity.

A method takes the numbers of source and target layers, L1 <= L2, and knows nothing else of the models.
"""

# Legend of the diagrams: A, B, … are source layers; lower case: a copy that begins as the identity.

from collections.abc import Callable
from dataclasses import dataclass

from megagrow.config import require
from megagrow.growth.maps import LayerMap


@dataclass(frozen=True)
class Depth:
    """How a stack of layers grows: w of the formula, and the layers whose residual branches begin at 0."""

    layers: LayerMap
    silent: frozenset[int] = frozenset()


def stack(num_source: int, num_target: int) -> Depth:
    """The whole stack of layers is repeated. Does not keep the function.

        A B  ->  A B A B          layer k copies layer k mod L1

    Source: StackBERT (Gong et al., 2019); G_stack (Du et al., 2024, arXiv 2405.15319, section 3).
    """
    return Depth(LayerMap(tuple(k % num_source for k in range(num_target))))


def interleave(num_source: int, num_target: int) -> Depth:
    """Every layer is followed by its copies. Does not keep the function.

        A B  ->  A A B B          layer k copies layer ⌊k · L1 / L2⌋

    Source: interpolation (Chang et al., 2018, arXiv 1710.10348; Dong et al., 2020).
    """
    return Depth(LayerMap(tuple(k * num_source // num_target for k in range(num_target))))


def insert_identity(num_source: int, num_target: int) -> Depth:
    """Copies are inserted at even distances, and what they add to the residual stream is 0. Exact for pre-norm models.

        A B C D  ->  A B b C D d          layer k copies layer ⌊((k + 1) L1 - 1) / L2⌋; of a run, the first is live
                                          b, d: attention.output = 0, mlp.down = 0, with their biases

    Only the matrices at the end of each branch are 0: their gradients are not, so that the layer can learn. (With norm
    gains of 0 instead, no gradient would reach anything.)

    Source: LLaMA-Pro (Wu et al., 2024, arXiv 2401.02415, section 3.2).
    """
    index = tuple(((k + 1) * num_source - 1) // num_target for k in range(num_target))
    return Depth(LayerMap(index), frozenset(k for k in range(1, num_target) if index[k] == index[k - 1]))


def middle(num_source: int, num_target: int) -> Depth:
    """The middle block is repeated behind itself. Does not keep the function.

        A B C  ->  A B B C          a block of b = L2 - L1 layers; where b divides L1, the middle one of its L1 / b
                                    blocks. More than twice as many layers are reached by doubling first.

    Source: MIDAS (Saunshi et al., 2024, arXiv 2409.19044, section 3).
    """
    index = list(range(num_source))
    while len(index) < num_target:
        size = min(len(index), num_target - len(index))
        start = (len(index) - size) // 2
        if len(index) % size == 0:
            start -= start % size
        index[start + size : start + size] = index[start : start + size]
    return Depth(LayerMap(tuple(index)))


def dus(num_source: int, num_target: int) -> Depth:
    """Two copies of the stack, of which the first loses its last m layers and the second its first m. Not exact.

        A B C D  ->  A B C B C D          m = L1 - L2 / 2

    Source: SOLAR's depth up-scaling (Kim et al., 2023, arXiv 2312.15166, section 2).
    """
    if num_source == num_target:
        return stack(num_source, num_target)
    require(
        num_target % 2 == 0 and num_target <= 2 * num_source,
        f"growth.method=dus lays two shortened copies of the source's {num_source} layers end to end and cannot reach "
        f"num_layers={num_target}; use an even number of at most {2 * num_source}",
    )
    kept = num_target // 2
    return Depth(LayerMap((*range(kept), *range(num_source - kept, num_source))))


DEPTHS: dict[str, Callable[[int, int], Depth]] = {
    "stack": stack,
    "interleave": interleave,
    "insert_identity": insert_identity,
    "middle": middle,
    "dus": dus,
}
