"""Measured comparisons: ways of getting a large model, at matched cost and with equal tuning, against training it from
scratch."""

from megagrow.compare.comparison import Comparison, check, compare
from megagrow.compare.suites import SIZES, SUITES

__all__ = ["SIZES", "SUITES", "Comparison", "check", "compare"]
