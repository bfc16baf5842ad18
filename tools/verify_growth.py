"""What a growth does to a model's function, gradients and optimizer step, on the model itself; nothing is written.

    python tools/verify_growth.py runs/small --target large.yaml --method clone
    python tools/verify_growth.py SRC … --method net2net --breaker noise --data PREFIX

SRC is an own checkpoint, a run directory or a Hugging Face folder; CONFIG as in grow_checkpoint.py. One process, both
models whole in memory, in float64. Exit codes: 0 done, 2 usage, or a target that the method cannot reach, 3 data.
"""

import argparse

import torch
from _command import Arguments, add_method, recipe_of, run
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megagrow.checkpoint.source import Source, open_source
from megagrow.config import Config, DataConfig, require
from megagrow.data.loader import Stream, shuffled
from megagrow.growth.offline import target_model
from megagrow.growth.recipe import Recipe
from megagrow.growth.verify import report
from megagrow.model import Transformer
from megagrow.train.streams import open_dataset

MEANING = {
    "function_change": "largest change of a logit, relative to the largest logit",
    "gradient_error": "of copied entries, against R(grad) / copies of the output",
    "step_error": "one AdamW step after growing by policy exact, against growing after it",
    "replica_distance": "between copies of a unit, right after growing",
    "replica_distance_later": "the same after some steps from fresh moments",
    "effective_rank_source": "mean over the source's matrices",
    "effective_rank": "mean over the target's, right after growing",
    "effective_rank_later": "the same after some steps",
}


def main() -> None:
    options = parser().parse_args()
    for name in ("seq_length", "batch_size", "steps"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')}={value} must be positive; leave it out for the default")
    source, target = open_source(options.src), target_model(options.target)
    require("ligo" not in options.method, "ligo's maps are learned, and have no rules that a step could be checked by")
    recipe = recipe_of(options, source.model, target)
    show(recipe, report(recipe, whole_model(source), tokens(source, options), options.steps))


def whole_model(source: Source) -> Transformer:
    model = Transformer(source.model).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.fetch(name))
    return model


def tokens(source: Source, options: argparse.Namespace) -> Tensor:
    length = min(options.seq_length, source.model.max_seq_length)
    if options.data is None:
        generator, shape = torch.Generator().manual_seed(options.seed), (options.batch_size, length + 1)
        return torch.randint(0, source.model.vocab_size, shape, generator=generator)
    config = Config(data=DataConfig(seq_length=length))
    stream = Stream([shuffled(open_dataset(options.data, source.model, config), options.seed)])
    return torch.as_tensor(stream.batch(0, options.batch_size, 0, 1).tokens).long()


def show(recipe: Recipe, figures: dict[str, float | None]) -> None:
    kept = "keeps" if recipe.keeps_function else "does not keep"
    table = Table(title=f"{recipe.method}, which says that it {kept} the function")
    for head in ("figure", "value", "what it is"):
        table.add_column(head)
    for name, value in figures.items():
        table.add_row(name, "no rule" if value is None else f"{value:.3g}", MEANING[name])
    Console(width=120).print(table)


def parser() -> Arguments:
    parser = Arguments(description="What a growth does to a model's function, gradients and optimizer step.")
    parser.add_argument("src", help="checkpoint, run directory or Hugging Face folder")
    add_method(parser)
    parser.add_argument("--data", metavar="PREFIX", help="tokens to compute on; without: random ones")
    parser.add_argument("--seq-length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="AdamW steps before replicas are looked at again")
    return parser


if __name__ == "__main__":
    run(main)
