"""The other people's functions, imported in one place: a good part of them warns while it is imported."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cut_cross_entropy import linear_cross_entropy
    from liger_kernel.ops import (
        LigerCrossEntropyFunction,
        LigerFusedAddRMSNormFunction,
        LigerFusedLinearCrossEntropyFunction,
        LigerFusedLinearJSDFunction,
        LigerFusedLinearKLDivFunction,
        LigerGELUMulFunction,
        LigerJSDFunction,
        LigerKLDivLossFunction,
        LigerLayerNormFunction,
        LigerLlama4RopeFunction,
        LigerRMSNormFunction,
        LigerRopeFunction,
        LigerSiLUMulFunction,
        LigerVocabParallelCEFunction,
    )
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
    from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.optimizer import Adam as MegatronAdam
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

__all__ = [
    "LigerCrossEntropyFunction",
    "LigerFusedAddRMSNormFunction",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearJSDFunction",
    "LigerFusedLinearKLDivFunction",
    "LigerGELUMulFunction",
    "LigerJSDFunction",
    "LigerKLDivLossFunction",
    "LigerLayerNormFunction",
    "LigerLlama4RopeFunction",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "LigerSiLUMulFunction",
    "LigerVocabParallelCEFunction",
    "MegatronAdam",
    "WrappedTorchNorm",
    "apply_rotary_pos_emb",
    "bias_dropout_add_fused_train",
    "bias_geglu_impl",
    "bias_gelu_impl",
    "bias_swiglu_impl",
    "fused_vocab_parallel_cross_entropy",
    "linear_cross_entropy",
    "parallel_state",
    "vocab_parallel_cross_entropy",
]
