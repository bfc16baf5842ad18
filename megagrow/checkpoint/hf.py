"""Hugging Face folders in and out; the families that are understood stand in hf_families.py."""

from megagrow.checkpoint.hf_config import (
    are_token_ids,
    check_exportable,
    hf_config_from_model,
    model_config_from_hf,
)
from megagrow.checkpoint.hf_reader import HFReader, is_hf_folder
from megagrow.checkpoint.hf_writer import check_target, write_hf_folder

__all__ = [
    "HFReader",
    "are_token_ids",
    "check_exportable",
    "check_target",
    "hf_config_from_model",
    "is_hf_folder",
    "model_config_from_hf",
    "write_hf_folder",
]
