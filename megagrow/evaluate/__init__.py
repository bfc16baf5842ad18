"""How good a model is: validation loss during training, perplexity, and the tasks of lm_eval."""

from megagrow.evaluate.perplexity import Perplexity, PerplexitySettings, evaluate_perplexity, num_labels
from megagrow.evaluate.result_file import write_result
from megagrow.evaluate.shared_model import SharedModel, load_shared_model
from megagrow.evaluate.validation import Evaluator, make_batch, make_masked_batch, mean_loss
from megagrow.evaluate.windows import Window

__all__ = [
    "Evaluator",
    "Perplexity",
    "PerplexitySettings",
    "SharedModel",
    "Window",
    "evaluate_perplexity",
    "load_shared_model",
    "make_batch",
    "make_masked_batch",
    "mean_loss",
    "num_labels",
    "write_result",
]
