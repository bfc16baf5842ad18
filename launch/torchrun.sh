#!/usr/bin/env bash
# One node:
#
#   launch/torchrun.sh PRESET_OR_FILE --run.dir DIR [--section.field VALUE ...]
#
#   NPROC_PER_NODE  ranks; auto: one for each GPU, or for each core where there is no GPU
#
# Ends with the run's own exit code, 1 for a crash. docs/launch.md says more.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$here/env.sh"

python=${PYTHON:-python}
command -v "$python" >/dev/null || { echo "megagrow: exit code 2: no $python here; set PYTHON to one that has megagrow" >&2; exit 2; }
exec "$python" "$here/agent.py" --standalone --nproc-per-node "${NPROC_PER_NODE:-auto}" -- "$@"
