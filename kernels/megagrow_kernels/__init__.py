"""Triton kernels of megagrow: plain local tensors in and out, no collective, no sharding."""

from megagrow_kernels.rms_norm import rms_norm
from megagrow_kernels.vocab_loss import vocab_grad_, vocab_rank, vocab_stats

__all__ = ["rms_norm", "vocab_grad_", "vocab_rank", "vocab_stats"]
