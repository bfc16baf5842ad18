"""Write down what a teacher says of every training sample, so that stage 1 can learn from it without the teacher.

    python tools/cache_teacher.py --model runs/small --data data/train --output cache --seq-length 512 --top-k 64
    torchrun --nproc-per-node 8 tools/cache_teacher.py … --sampled 12 --tensor 2

Then train with --salt.cache cache in place of --salt.teacher. CKPT is an own checkpoint, a run directory or a Hugging
Face folder; PREFIX names PREFIX.bin/.idx. Interrupted work goes on when the same command is run again; a finished cache
is left alone.
Exit codes: 0 done, 2 usage, 3 data (the model does not fit the corpus, or DIR holds something else), 4 checkpoint.
"""

from _command import Arguments, run
from _reading import add_reading, mesh_of, reading_of

from megagrow.checkpoint.source import open_source
from megagrow.data.dataset import PackedDataset
from megagrow.flops import forward_flops
from megagrow.metrics import Progress
from megagrow.parallel.mesh import leave_distributed
from megagrow.salt import CacheSettings, TeacherCache, cache_teacher, samples_to_cache


def main() -> None:
    options = parser().parse_args()
    kept = {name: getattr(options, name) for name in ("top_k", "sampled", "temperature")}
    settings = CacheSettings(**kept, **reading_of(options))
    source = open_source(options.model)
    dataset = PackedDataset(options.data, options.seq_length, source.model.vocab_size)
    samples = samples_to_cache(options.samples, dataset.num_samples, options.seed)
    num_samples = dataset.num_samples if samples is None else len(samples)
    flops = forward_flops(source.model, num_samples * dataset.seq_length, dataset.seq_length)
    mesh = mesh_of(options)
    with Progress(num_samples, enabled=mesh.is_main) as progress:
        cache_teacher(source, dataset, options.output, mesh, settings, samples, flops, progress)
    if mesh.is_main:
        show(options.output)
    leave_distributed()


def parser() -> Arguments:
    parser = Arguments(description="Write down what a teacher says of every training sample.")
    add_reading(parser, "cache")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens, and the mass of the others")
    parser.add_argument("--sampled", type=int, default=0, metavar="N", help="or keep N draws instead, unbiased")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="RHO", help="that of salt.temperature")
    parser.add_argument("--samples", default="", metavar="A:B|SHARE", help="ids A … B - 1, or what is drawn first")
    parser.add_argument("--seed", type=int, default=1234, help="data.seed of the runs that draw the share")
    return parser


def show(output: str) -> None:
    cache = TeacherCache(output)
    size, tokens = cache.num_bytes, cache.cost.tokens
    print(f"{cache.num_cached:,} samples, {tokens:,} tokens, {cache.cost.seconds:.1f} s")
    print(f"{size:,} bytes, {size / tokens:.1f} per token")
    print(f"the cache is in {output}")


if __name__ == "__main__":
    run(main)
