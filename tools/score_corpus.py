"""Score a corpus with a small model, for SALT's selection of training data.

    python tools/score_corpus.py --model runs/small --data data/train --output scores \
        --seq-length 512 --top-k 10
    torchrun --nproc-per-node 8 tools/score_corpus.py … --tensor 2

CKPT is an own checkpoint, a run directory or a Hugging Face folder; PREFIX names PREFIX.bin/.idx.
An interrupted scoring goes on when the same command is run again; finished scores are left alone.
Exit codes: 0 done, 2 usage, 3 data (the model does not fit the corpus, or DIR holds other scores),
4 checkpoint.
"""

from _command import Arguments, run
from _reading import add_reading, mesh_of, reading_of

from megagrow.checkpoint.source import Source, open_source
from megagrow.data.dataset import PackedDataset
from megagrow.flops import forward_flops
from megagrow.metrics import Progress
from megagrow.parallel.mesh import Mesh, leave_distributed
from megagrow.salt import ScoreSettings, read_scores, score_corpus


def main() -> None:
    options = parser().parse_args()
    settings = ScoreSettings(top_k=options.top_k, **reading_of(options))
    source = open_source(options.model)
    dataset = PackedDataset(options.data, options.seq_length, source.model.vocab_size)
    mesh = mesh_of(options)
    score(source, dataset, options.output, mesh, settings)
    if mesh.is_main:
        show(options.output, dataset)
    leave_distributed()


def parser() -> Arguments:
    parser = Arguments(description="Score packed training samples with a small model.")
    add_reading(parser, "scores")
    parser.add_argument("--top-k", type=int, default=10, help="labels of rank < k count as known")
    return parser


def score(source: Source, dataset: PackedDataset, output: str, mesh: Mesh, settings: ScoreSettings) -> None:
    tokens = dataset.num_samples * dataset.seq_length
    flops = forward_flops(source.model, tokens, dataset.seq_length)
    with Progress(dataset.num_samples, enabled=mesh.is_main) as progress:
        score_corpus(source, dataset, output, mesh, settings, flops, progress)


def show(output: str, dataset: PackedDataset) -> None:
    scores = read_scores(output, dataset)
    for name, values in scores.values.items():
        print(f"{name}: mean {values.mean():.4f}, from {values.min():.4f} to {values.max():.4f}")
    cost = scores.cost
    print(f"{len(scores.num_tokens):,} samples, {cost.tokens:,} tokens, {cost.seconds:.1f} s")
    print(f"scores are in {output}")


if __name__ == "__main__":
    run(main)
