"""Triton kernels of megagrow: plain local tensors in and out, no collective, no sharding."""

from megagrow_kernels.adamw import AdamWTable, adamw_
from megagrow_kernels.dense_map import dense_blocks_, dense_map, dense_map_
from megagrow_kernels.distill_loss import distill_grad_, distill_stats
from megagrow_kernels.dropout_add import dropout_add
from megagrow_kernels.gelu import bias_gelu
from megagrow_kernels.glu import geglu, swiglu
from megagrow_kernels.layer_mix import layer_mix
from megagrow_kernels.norm import layer_norm, rms_norm
from megagrow_kernels.rope import rope_
from megagrow_kernels.sparse_map import sparse_map_
from megagrow_kernels.vocab_loss import vocab_grad_, vocab_scores, vocab_stats

__all__ = [
    "AdamWTable",
    "adamw_",
    "bias_gelu",
    "dense_blocks_",
    "dense_map",
    "dense_map_",
    "distill_grad_",
    "distill_stats",
    "dropout_add",
    "geglu",
    "layer_mix",
    "layer_norm",
    "rms_norm",
    "rope_",
    "sparse_map_",
    "swiglu",
    "vocab_grad_",
    "vocab_scores",
    "vocab_stats",
]
