#!/usr/bin/env bash
# Usage: dist_train.sh CONFIG GPUS [options of train.py]; NNODES, NODE_RANK, MASTER_ADDR and PORT for several machines.
set -euo pipefail
tools=$(dirname "$0")
config=$1 gpus=$2
shift 2
python -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$gpus" \
    "$tools/train.py" "$config" --launcher pytorch "$@"
