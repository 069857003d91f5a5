#!/usr/bin/env bash
set -euo pipefail
usage="Usage: $(basename "$0") CONFIG CHECKPOINT PROCESSES [options of test.py]
PROCESSES on this machine: one for each GPU, or any number on CPUs. NNODES, NODE_RANK, MASTER_ADDR and PORT for several machines."
if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "$usage" >&2
    exit 2
fi
tools=$(dirname "$0")
config=$1 checkpoint=$2 processes=$3
shift 3
python -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$processes" \
    "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
