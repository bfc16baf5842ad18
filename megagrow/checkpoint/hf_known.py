"""Every Hugging Face model type that is understood, with its table."""

from megagrow.checkpoint import hf_families
from megagrow.checkpoint.hf_encoders import ENCODERS

FAMILIES: dict[str, hf_families.Family] = {**hf_families.FAMILIES, **ENCODERS}
