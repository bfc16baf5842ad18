"""The families that are understood; a new one gets a table of its own, and its place here."""

from megagrow.checkpoint.hf_decoders import GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3
from megagrow.checkpoint.hf_encoders import BERT, ROBERTA
from megagrow.checkpoint.hf_family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, GPT_NEOX, BERT, ROBERTA)
}
