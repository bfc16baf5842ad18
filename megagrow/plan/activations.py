"""What a microbatch leaves behind for its backward pass, and what passes need beside that while they run.

The entries follow the code of megagrow/model and megagrow/ops.py operation by operation; a test compares them with what
autograd really saves. All figures are bytes of one microbatch on one rank.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megagrow import cpu_ops, ops
from megagrow.config import ModelConfig
from megagrow.parallel.loss import CACHES, tokens_at_once
from megagrow.parallel.loss_terms import teacher_tokens
from megagrow.parallel.stages import Stage
from megagrow.plan.layout import Layout
from megagrow.plan.weights import layer_names, stored_elements
from megagrow.roles import role_of
from megagrow.torch_vocab_ops import chunk_logits

DeviceType = Literal["cuda", "cpu"]
ENTRY = 40  # bytes of an entry of a cache while the loss works on it
SCORED_LOGIT = 16  # bytes of a logit that the twin of the scoring kernel works on


@dataclass(frozen=True)
class Sizes:
    """Bytes of one microbatch's activations on one rank, in the dtype of compute.

    Attributes:
        cut: the residual stream between sharded regions.
        whole: the same inside of them, where it is not cut along the sequence.
        query, key: queries, and keys (or values), of this rank's heads.
        ffn: one value per neuron of this rank.
        wide: what one byte in the dtype of compute takes in float32.
        statistic: one float32 per token of `cut`.
    """

    cut: int
    whole: int
    query: int
    key: int
    ffn: int
    wide: int
    statistic: int


def sizes(layout: Layout) -> Sizes:
    model, width = layout.model, layout.width
    per_token = layout.tokens * width
    return Sizes(
        cut=layout.activation,
        whole=per_token * model.hidden_size,
        query=per_token * model.num_heads // layout.tensor * model.head_dim,
        key=per_token * max(model.num_kv_heads // layout.tensor, 1) * model.head_dim,
        ffn=per_token * model.ffn_size // layout.tensor,
        wide=4 // width,
        statistic=4 * layout.cut_tokens,
    )


def kept_by_block(layout: Layout, device: DeviceType) -> dict[str, int]:
    """What one block keeps of a microbatch from its forward pass to its backward pass, by name."""
    size, how = sizes(layout), layout.config.train.recompute
    if how == "full":
        return {"input": size.cut, **_kept_keys(layout)}
    if how == "selective":
        return {"input": size.cut, **_kept_results(layout, size, device), **_kept_keys(layout)}
    return kept_without_recompute(layout, device)


def kept_without_recompute(layout: Layout, device: DeviceType) -> dict[str, int]:
    """What autograd keeps of a whole block, where nothing is computed again."""
    size, model = sizes(layout), layout.model
    column_input = size.cut if _keeps_cut_input(layout) else size.whole
    norm = _kept_by_norm(layout, size.cut, size.statistic, device)
    kept = {
        "norms": 2 * norm - _shared_by_norms(layout, size, device),
        "inputs of the blocks' halves": 2 * column_input,
        "queries, keys and values": _kept_queries(layout, size, device),
        "attention": _kept_attention(layout, size, device),
        "mlp": (3 if model.is_gated else 2) * size.ffn,
        "copies of weights": weight_copies(layout, device),
        **_kept_keys(layout),
    }
    return {name: num_bytes for name, num_bytes in kept.items() if num_bytes}


def _kept_keys(layout: Layout) -> dict[str, int]:
    """Dropout's keys, of which each layer has its own; the masks are computed again."""
    return {"keys": 8 * layout.cut_tokens} if layout.config.train.dropout else {}


def weight_copies(layout: Layout, device: DeviceType) -> int:
    """Weights of a block in the dtype of compute, if microbatches cast them; else FSDP2 does once per gathering.

    A CPU copies those of gate and up in any case, to have them one after the other.
    """
    if not layout.casts_at_use:
        copied = device == "cpu" and layout.model.is_gated
        return layout.width * _gate_up_elements(layout) if copied else 0
    names = layer_names(layout.model)
    shard = layout.shard if layout.uses_fsdp else 1
    return layout.width * shard * sum(stored_elements(layout, name) for name in names if role_of(name).kind != "bias")


def _gate_up_elements(layout: Layout) -> int:
    """Of the fused weight of gate and up, as a rank multiplies by it."""
    return 2 * layout.model.ffn_size // layout.tensor * layout.model.hidden_size


def _keeps_cut_input(layout: Layout) -> bool:
    """Whether a layer whose input was gathered along the sequence keeps its piece alone, and gathers it again."""
    return layout.sequence_parallel and not layout.config.parallel.splits_backward


def _kept_by_norm(layout: Layout, num_bytes: int, statistic: int, device: DeviceType) -> int:
    """Of a norm over elements that take `num_bytes` in the dtype of compute; `statistic` is one float32 per row.

    The kernels keep the input; torch's RMSNorm on CPUs keeps it and the quotient, both in float32.
    """
    if layout.model.norm == "layer_norm":
        return num_bytes + (2 * statistic if device == "cuda" else 2 * statistic // sizes(layout).wide)
    return num_bytes + statistic if device == "cuda" else 2 * num_bytes * sizes(layout).wide + statistic


def _shared_by_norms(layout: Layout, size: Sizes, device: DeviceType) -> int:
    """What the norms of a block's halves keep together, where both halves read the same stream."""
    return size.cut if layout.model.parallel_residual and not _norms_convert(layout, device) else 0


def _kept_queries(layout: Layout, size: Sizes, device: DeviceType) -> int:
    model = layout.model
    local = 2 * size.key  # values are a view of the layer's output, which holds keys and values
    if model.positions == "rope" or model.qk_norm:
        local += size.key
    if layout.context > 1:
        local = 2 * size.key * layout.context
    kept = size.query + local
    if device == "cuda" and layout.width == 4:
        kept += 2 * size.query  # keys and values, repeated for each query head
    return kept + (_kept_head_norms(layout, size, device) if model.qk_norm else 0)


def _kept_head_norms(layout: Layout, size: Sizes, device: DeviceType) -> int:
    """Of the norms of queries and keys."""
    head_bytes, rms = layout.model.head_dim * layout.width, replace(layout.model, norm="rms_norm")
    kept = sum(
        _kept_by_norm(layout.of_model(rms), num_bytes, 4 * num_bytes // head_bytes, device)
        for num_bytes in (size.query, size.key)
    )
    if device == "cpu" and size.wide == 1:  # keys are a view of the layer's output, which is kept for values
        kept += size.key if layout.context > 1 else -size.key
    return kept


def _kept_attention(layout: Layout, size: Sizes, device: DeviceType) -> int:
    if _computes_probabilities_again(layout, device):
        return size.query
    runs = layout.context > 1 and layout.model.is_causal
    joined = size.query if runs else 0  # the results of two runs of queries, and both together
    masks = _masks(layout) if device == "cpu" and layout.config.data.mask_documents else 0
    return size.query + joined + _log_sums(layout, size, device) + masks


def _computes_probabilities_again(layout: Layout, device: DeviceType) -> bool:
    """Whether attention is the CPU's own, which needs neither its result nor statistics for its backward pass."""
    return device == "cpu" and layout.model.is_causal and not layout.config.data.mask_documents


def _masks(layout: Layout) -> int:
    """What a CPU's attention keeps of documents' masks for every sample."""
    length = layout.config.data.seq_length
    if layout.context == 1 or not layout.model.is_causal:  # one run, of all of this rank's queries
        return layout.microbatch * length**2 // layout.context * layout.width
    run = length // (2 * layout.context)  # the first context rank's runs see one of these, and all
    return layout.microbatch * run * (run + length) * layout.width


def _log_sums(layout: Layout, size: Sizes, device: DeviceType) -> int:
    return (
        0 if _computes_probabilities_again(layout, device) else 4 * size.query // (layout.model.head_dim * layout.width)
    )


def _kept_results(layout: Layout, size: Sizes, device: DeviceType) -> dict[str, int]:
    """Results of matrix products, attention and sums over the tensor ranks."""
    up = 2 * size.ffn if layout.model.is_gated else size.ffn
    summed = 2 * size.cut if layout.tensor > 1 else 0
    return {
        "products": size.query + 2 * size.key + up + 2 * size.whole,
        "attention": size.query + _log_sums(layout, size, device),
        "sums": summed,
    }


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one microbatch in one block.

    Attributes:
        kept: from its forward to its backward pass.
        working: what the backward pass needs at most beside that.
        deferred: what a schedule that splits the backward pass holds between its halves, beside `kept`.
        forward: what a forward pass that keeps nothing holds at most: no more than one that keeps all.
    """

    kept: int
    working: int
    deferred: int
    forward: int


def block_cost(layout: Layout, device: DeviceType) -> BlockCost:
    """What the microbatch in a block takes; the same for all blocks.

    A backward pass needs the gradient that came in and, in the MLP, gradients of its products with what they are
    made of, or of the weight of gate and up, whose rows a CPU has to put back in order. Recomputing first brings
    back all that was not kept. Between two halves of a backward pass the gradients of all layers' results wait.
    """
    size, model, how = sizes(layout), layout.model, layout.config.train.recompute
    kept, forward = (sum(of(layout, device).values()) for of in (kept_by_block, kept_without_recompute))
    again = 0 if how == "none" else forward - kept
    if how == "selective":
        again += size.whole  # the last product, which nobody asks for again
    up = 2 * size.ffn if model.is_gated else size.ffn
    working = size.cut + max(_working_of_mlp(layout, size, device), _working_of_dropout(layout, size, device)) + again
    return BlockCost(kept, working, size.query + 2 * size.key + up + 2 * size.whole + 2 * size.cut, forward)


def _working_of_mlp(layout: Layout, size: Sizes, device: DeviceType) -> int:
    if not layout.model.is_gated:
        return 2 * size.ffn
    if device == "cuda":
        return 5 * size.ffn
    copies = 2 * 4 + (layout.width if layout.width == 2 else 0)  # in float32 as computed and in order, and before that
    return max(4 * size.ffn, copies * _gate_up_elements(layout) + 2 * size.whole - size.ffn)


def _working_of_dropout(layout: Layout, size: Sizes, device: DeviceType) -> int:
    """The twin draws 64-bit numbers for every element, and masks; a kernel, or a compiler, keeps them in registers."""
    train = layout.config.train
    if train.dropout == 0 or train.compile or (device == "cuda" and "dropout_add" in ops.chosen(train.kernels)):
        return 0
    return 18 * size.cut // layout.width


def kept_by_stage(layout: Layout, stage: Stage, block: BlockCost, device: DeviceType, frozen_layers: int = 0) -> int:
    """What a whole stage keeps of a microbatch, with its output, which a pipeline holds until it is sent and used.

    That of the loss comes on top. Layers that are frozen, from the first one of the model on, keep nothing.
    """
    size, model = sizes(layout), layout.model
    norm = _kept_by_norm(layout, size.cut, size.statistic, device)
    learning = [layer for layer in stage.layers if layer >= frozen_layers]
    kept = len(learning) * block.kept
    if stage.is_first and model.norm_place == "after" and not frozen_layers:
        kept += norm
    if not stage.is_last:
        kept += size.cut
    elif model.norm_place == "before":
        kept += norm
    if stage.is_last and not model.is_causal:  # inputs of the head's dense layer, of its activation and of its norm
        kept += 2 * size.cut + norm
    if not stage.is_first and learning and learning == list(stage.layers) and _keeps_input(layout, device):
        kept -= size.cut  # it is what the stage received, and counted there
    return kept


def _keeps_input(layout: Layout, device: DeviceType) -> bool:
    """Whether a block keeps its input as it came; a CPU's RMSNorm keeps a copy in float32 instead."""
    return layout.config.train.recompute != "none" or not _norms_convert(layout, device)


def _norms_convert(layout: Layout, device: DeviceType) -> bool:
    """Whether norms keep a copy of their input in float32 instead of the input itself."""
    return device == "cpu" and layout.width == 2 and layout.model.norm == "rms_norm"


@dataclass(frozen=True)
class Loss:
    """Bytes of the loss of one microbatch.

    Attributes:
        kept: from its forward to its backward pass.
        forward, backward: while these run, `kept` included.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Cached:
    """What a teacher left behind of each position.

    Attributes:
        num_entries: tokens.
        needs_copy: whether the loss divides the student's logits, or leaves some out, in a copy of them.
    """

    num_entries: int
    needs_copy: bool

    @property
    def per_token(self) -> int:
        """Bytes of a token's targets: ids, and the masses of these and of the rest."""
        return 4 * self.num_entries + 4 * (self.num_entries + 1)


def loss(
    layout: Layout,
    device: DeviceType,
    teacher: ModelConfig | None = None,
    head_learns: bool = True,
    cached: Cached | None = None,
) -> Loss:
    """The gradients that the loss computes in its forward pass, and what that takes.

    Logits exist for `train.loss_chunk` tokens at a time, the teacher's for a piece of them. They are written, passed
    over, and multiplied for the gradients of the states and of the output matrix: what one of these takes is gone when
    the next begins.
    """
    size, model, width = sizes(layout), layout.model, layout.width
    rows = -(-model.vocab_size // layout.tensor)
    matrix = rows * model.hidden_size
    summed = matrix if head_learns else 0
    chunk = min(tokens_at_once(layout.config.train.loss_chunk, rows, width, CACHES[device]), layout.tokens)
    logits = chunk * rows
    taught = min(logits, teacher_tokens(rows, width, device) * rows) if teacher is not None else 0
    kept = size.whole + 4 * summed + (0 if model.is_causal else 4 * rows)  # gradients of states, matrix and bias
    copy = width * matrix if layout.casts_at_use else 0
    passes = width * taught + _twin_rows(layout, taught or logits, device, with_teacher=teacher is not None)
    passes += _of_cached(layout, cached, chunk, logits) if cached is not None else 0
    copied = _of_logits_piece(layout, device, chunk, rows)
    added = copied + _of_head_gradient(layout, device, rows) if head_learns else 0
    working = copy + width * logits + max(passes, copied, size.whole, added)
    return Loss(kept, kept + working, kept + (size.whole * size.wide if width == 2 and device == "cpu" else 0))


def _of_logits_piece(layout: Layout, device: DeviceType, chunk: int, rows: int) -> int:
    """oneDNN's copy of a piece of the logits: when they are written, and when the output matrix's gradient reads it."""
    if device != "cpu" or layout.width != 4 or not cpu_ops.TAKES_FLOAT32:
        return 0
    return layout.width * chunk * min(rows, cpu_ops.PIECE_ROWS)


def _of_head_gradient(layout: Layout, device: DeviceType, rows: int) -> int:
    """A piece of the output matrix's gradient, which is summed in float32, piece by piece; a CPU converts each."""
    hidden, width = layout.model.hidden_size, layout.width
    converted = 4 if device == "cpu" and width == 2 else 0
    return (width + converted) * hidden * min(rows, ops.piece_rows(device, hidden, width))


def _of_cached(layout: Layout, cached: Cached, chunk: int, logits: int) -> int:
    """The microbatch's ids as int64; places, logits and masses of a chunk's entries; the copy of its logits."""
    ids = 8 * layout.tokens * cached.num_entries
    return ids + ENTRY * chunk * cached.num_entries + (4 * logits if cached.needs_copy else 0)


def scoring(layout: Layout, device: DeviceType) -> int:
    """What it takes to score the labels of a microbatch: a forward pass that keeps nothing, and logits."""
    size, model = sizes(layout), layout.model
    kernels = ops.chosen(layout.config.train.kernels) if device == "cuda" else ()
    wide = 3 if "glu" in kernels else 4  # gate and up, without a kernel gate's activation, and the result
    mlp = (wide if model.is_gated else 2) * size.ffn
    if device == "cpu" and model.is_gated:
        mlp += layout.width * _gate_up_elements(layout)
    rows = -(-model.vocab_size // layout.tensor)
    logits = min(tokens_at_once(0, rows, layout.width, CACHES[device]), layout.tokens) * rows
    twin = 0 if "vocab_loss" in kernels else SCORED_LOGIT * min(logits, chunk_logits(device))
    block = 2 * size.cut + size.whole + max(2 * size.query + 3 * size.key, mlp)
    return max(block, size.whole + layout.width * logits + twin)


def _twin_rows(layout: Layout, logits: int, device: DeviceType, with_teacher: bool) -> int:
    """What the loss's twins take for the rows that they work on at a time; a kernel, or a compiler, takes nothing."""
    train = layout.config.train
    serving = ops.chosen(train.kernels) if device == "cuda" else ()
    if train.compile or ("distill_loss" if with_teacher else "vocab_loss") in serving:
        return 0
    own, taught = (1, 5) if layout.width == 4 else (2, 7)  # of narrow logits, wide copies too
    arrays = taught if with_teacher else own
    return 4 * arrays * min(logits, chunk_logits(device))


def embedding_gradient(layout: Layout) -> int:
    """The dense gradient of the embedding, which is new memory where it is added to an earlier one."""
    return 4 * -(-layout.model.vocab_size // layout.tensor) * layout.model.hidden_size


def tables(layout: Layout) -> int:
    """Cosines and sines of the positions."""
    if layout.model.positions != "rope":
        return 0
    own = layout.tokens if layout.config.data.reset_positions else 0  # beside the table, a row of it for every token
    return 2 * (layout.config.data.seq_length // layout.context + own) * layout.model.rotary_dim * layout.width
