"""Megatron's datasets, imported in one place: it warns while it is imported, and while it reads without a cache."""

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

__all__ = ["IndexedDatasetBuilder", "build_splits", "helpers", "make_config"]


def make_config(seq_length: int, seed: int, vocab_size: int, **fields: Any) -> GPTDatasetConfig:
    """A configuration of Megatron's datasets for plain next-token training; `fields` say which data."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eod=vocab_size, pad=-1, unique_identifiers={"class": "none"})
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **fields,
    )


def build_splits(sizes: Sequence[int | None], config: GPTDatasetConfig) -> list[Any]:
    """Megatron's datasets for training, validation and test; None for a split without data."""
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
