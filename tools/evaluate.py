"""Evaluate a model: perplexity on a dataset, or tasks of lm_eval.

    python tools/evaluate.py runs/grown --data data/validation --output perplexity.json
    torchrun --nproc-per-node 8 tools/evaluate.py CKPT --tasks lambada_openai hellaswag --tensor 4

CKPT is an own checkpoint, a run directory or a Hugging Face folder; PREFIX names PREFIX.bin/.idx. Tasks need
`pip install 'megagrow[eval]'`. Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint.
"""

from argparse import Namespace
from dataclasses import asdict

import torch
from _command import Arguments, find_tokenizer, refuse_options, run

from megagrow.checkpoint.convert import tokenizer_of
from megagrow.checkpoint.source import Source, open_source
from megagrow.data.files import check_folder
from megagrow.data.indexed import IndexedDataset
from megagrow.data.tokenizer import load_tokenizer
from megagrow.evaluate import PerplexitySettings, evaluate_perplexity, load_shared_model, num_labels, write_result
from megagrow.evaluate.tasks import TaskSettings, check_lm_eval, evaluate_tasks, task_table
from megagrow.evaluate.transformers_tokenizer import load_transformers_tokenizer
from megagrow.metrics import Progress
from megagrow.parallel.mesh import Mesh, leave_distributed, make_inference_mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
WAITING_SECONDS = 86_400.0  # what ranks may wait while the first one prepares a task


def main() -> None:
    options = parser().parse_args()
    mode, other = ("--tasks", PerplexitySettings) if options.tasks else ("--data", TaskSettings)
    refuse_options(parser(), options, other.__dataclass_fields__.keys() - {"tasks"}, f"with {mode}")
    if options.output:
        check_folder(options.output)
    source = open_source(options.checkpoint)
    mesh = make_inference_mesh(options.tensor, WAITING_SECONDS)
    (on_tasks if options.tasks else on_dataset)(options, source, mesh)
    leave_distributed()


def on_dataset(options: Namespace, source: Source, mesh: Mesh) -> None:
    settings = PerplexitySettings(**{name: getattr(options, name) for name in PerplexitySettings.__dataclass_fields__})
    dataset, path = IndexedDataset(options.data), options.tokenizer or tokenizer_of(source)
    shared = load_shared_model(source, mesh, options.batch_size, DTYPES[options.precision])
    with Progress(num_labels(dataset, settings), enabled=mesh.is_main) as progress:
        found = evaluate_perplexity(shared, dataset, settings, load_tokenizer(path) if path else None, progress)
    if mesh.is_main:
        print(found.summary)
        if options.output:
            write_result(options.output, source, {"data": options.data, **asdict(settings)}, found.as_dict())


def on_tasks(options: Namespace, source: Source, mesh: Mesh) -> None:
    settings = TaskSettings(**{name: getattr(options, name) for name in TaskSettings.__dataclass_fields__})
    check_lm_eval()
    tokenizer = load_transformers_tokenizer(find_tokenizer(options.tokenizer, source))
    shared = load_shared_model(source, mesh, options.batch_size, DTYPES[options.precision])
    with Progress(0, enabled=mesh.is_main) as progress:
        found = evaluate_tasks(shared, tokenizer, settings, progress)
    if found is not None:
        print(task_table(found))
        if options.output:
            write_result(options.output, source, asdict(settings), found)


def parser() -> Arguments:
    parser = Arguments(description="Perplexity on a dataset, or tasks of lm_eval.")
    parser.add_argument("checkpoint", metavar="CKPT")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="PREFIX", help="perplexity on PREFIX.bin/.idx")
    what.add_argument("--tasks", nargs="+", metavar="T", help="names of lm_eval's tasks or groups")
    parser.add_argument("--output", default="", metavar="FILE", help="JSON file of the results")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share the model")
    parser.add_argument("--batch-size", type=int, default=16, help="texts per forward pass")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--tokenizer", default="", help="when the checkpoint does not name one")
    data = parser.add_argument_group("with --data")
    data.add_argument("--length", type=int, default=0, help="tokens of context; 0: all that the model was made for")
    data.add_argument("--stride", type=int, default=0, help="labels per window of a long text; 0: the length")
    data.add_argument("--packed", action="store_true", help="documents end to end, as in training")
    data.add_argument("--mask-documents", action="store_true", help="attention stays inside a packed document")
    data.add_argument("--max-documents", type=int, default=0, help="the first ones; 0: all")
    data.add_argument("--prefix", type=int, help="token before a document; default: the one that ends documents")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--include-path", default="", metavar="DIR", help="more tasks, YAML; they can run code")
    tasks.add_argument("--num-fewshot", type=int, help="examples before each question; default: the task's")
    tasks.add_argument("--limit", type=int, default=0, help="questions of each task; 0: all")
    tasks.add_argument("--chat-template", action="store_true", help="questions as turns of a conversation")
    tasks.add_argument("--seed", type=int, default=1234, help="of sampling and of the examples before questions")
    return parser


if __name__ == "__main__":
    run(main)
