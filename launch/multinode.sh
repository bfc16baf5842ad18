#!/usr/bin/env bash
# Several nodes: start this on each of them, with the same arguments.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/multinode.sh PRESET_OR_FILE --run.dir DIR [--section.field VALUE ...]
#
#   NNODES          nodes; all must come, and all must see DIR
#   NODE_RANK       0 on the node that MASTER_ADDR names, another number on each of the others
#   MASTER_ADDR     name or address of the node where the others meet it; MASTER_PORT (29400) must be open between them
#   JOB_ID          the same on all nodes, another one for another job (megagrow)
#   LOCAL_ADDR      own address, where other nodes cannot resolve this one's host name
#   NPROC_PER_NODE  ranks on this node; auto: one for each GPU, or for each core where there is no GPU
#
# What is not set is taken from PET_*, the names under which torchrun (and Kubeflow for it) knows the same things, and
# NODE_RANK from SLURM.
# Ends with the run's own exit code, 1 for a crash. docs/launch.md says more.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$here/env.sh"

: "${NNODES:=${PET_NNODES:?how many nodes? set NNODES}}"
: "${NODE_RANK:=${PET_NODE_RANK:-${SLURM_NODEID:?which node is this? set NODE_RANK}}}"
: "${MASTER_ADDR:=${PET_MASTER_ADDR:?where do the nodes meet? set MASTER_ADDR}}"
: "${MASTER_PORT:=${PET_MASTER_PORT:-29400}}"
: "${NPROC_PER_NODE:=${PET_NPROC_PER_NODE:-auto}}"
export NODE_RANK
unset PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT # of the static rendezvous: torchrun would warn

# Who hosts the meeting point is said, because a guess by host name fails where MASTER_ADDR is an alias. Nodes may be
# minutes apart: images are pulled, disks are mounted.
[ "$NODE_RANK" = 0 ] && is_host=true || is_host=false
python=${PYTHON:-python}
command -v "$python" >/dev/null || { echo "megagrow: exit code 2: no $python here; set PYTHON to one that has megagrow" >&2; exit 2; }
exec "$python" "$here/agent.py" \
    --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${JOB_ID:-megagrow}" \
    --rdzv-conf "is_host=$is_host,read_timeout=900,join_timeout=900" -- "$@"
