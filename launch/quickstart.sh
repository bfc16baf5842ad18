#!/usr/bin/env bash
# The whole of megagrow on real text, in minutes on two CPU cores:
#
#   corpus -> small model -> it scores the corpus -> large model from scratch at three budgets
#          -> large model grown from the small one by LiGO, trained with SALT on the data that the small one picked
#          -> report -> Hugging Face folder -> a short generated sample
#
# Run it again after an interruption: finished phases are skipped, the one in the middle resumes from its checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=   # two ranks need two GPUs or none: the same everywhere

RUNS=runs/quickstart
RANKS=2
BUDGETS="200 350 600"   # steps of the large model from scratch; each budget has its own finished schedule

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }

on_ranks() { python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" "$@"; }

finished() { grep -q '"code": 0' "$1/exit.json" 2>/dev/null; }

train() {   # RUN_DIR PRESET [OPTIONS...]
    local dir=$1; shift
    if finished "$dir"; then echo "$dir is finished"; else on_ranks -m megagrow "$@" --run.dir "$dir"; fi
}

began=$SECONDS
say "1/8  The corpus: source code of Python's standard library, a tokenizer trained on it, token files"
python tools/make_builtin_corpus.py --output $RUNS/data --vocab-size 2048 --limit-bytes 4000000

say "2/8  A small model, trained on $RANKS ranks"
train $RUNS/small quickstart_small

say "3/8  The small model scores the corpus: which samples are challenging, yet learnable?"
on_ranks tools/score_corpus.py --model $RUNS/small --data $RUNS/data/train --output $RUNS/scores --seq-length 128 --top-k 10

say "4/8  The large model from scratch at three budgets: what growing has to beat"
for steps in $BUDGETS; do
    train $RUNS/scratch-"$steps" quickstart_scratch --train.steps "$steps"
done

say "5/8  The large model grown from the small one: LiGO learns the operator on shards, then SALT"
train $RUNS/grown_salt quickstart_grown_salt

say "6/8  The report: loss against FLOPs and time, savings by both conventions"
python tools/report.py $RUNS/small $(for steps in $BUDGETS; do echo $RUNS/scratch-"$steps"; done) $RUNS/grown_salt \
    --output $RUNS

say "7/8  The grown model as a Hugging Face folder"
if [ -f $RUNS/hf/config.json ]; then echo "$RUNS/hf is there"; else python tools/convert_checkpoint.py $RUNS/grown_salt $RUNS/hf --to hf; fi

say "8/8  A sample of what it writes"
python tools/generate.py $RUNS/hf --prompt "def read" --tokens 48

say "Done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s. Look at $RUNS/report.md and $RUNS/curves.png; the model is in $RUNS/hf."
