#!/usr/bin/env bash
# Check and measure mmdyn on a machine with a GPU, torch and no package index; docs/gpu.md says how and what.
# Each step has a time limit and keeps what it found at once; none stops the others. After 8 minutes it is over; the
# first 4 have the tests of what runs on a GPU, and the cases of the benchmark that matter most.
set -uo pipefail
[ $# = 1 ] || { echo "usage: bash tools/gpu_check.sh OUT    (the folder of the results)" >&2; exit 2; }
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
KIT=${KIT:-.gpu-kit}
ls "$KIT"/*.whl > /dev/null 2>&1 || {
	echo "There are no wheels in $KIT: run 'make gpu-kit' where there is a package index." >&2
	exit 2
}
END=$((SECONDS + ${GPU_CHECK_SECONDS:-470}))
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
RESULTS=$OUT/results.json
rm -f "$RESULTS"
export PYTHONPATH=$PWD:$WORK/site PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-8}
tests=(-m pytest -p no:cacheprovider -vv)  # so that the log tells of each test, if time is up before the results
parallel() {  # PROCESSES, where pytest can
	"$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $1"
}

# step NAME SECONDS COMMAND...
step() {
	local name=$1 limit=$2 start=$SECONDS code
	shift 2
	[ $limit -lt $((END - SECONDS)) ] || limit=$((END - SECONDS))
	if [ $limit -lt 1 ]; then
		echo "== $name: no time is left"
		return
	fi
	echo "== $name, at most $limit s: $*"
	# An interrupt lets pytest write its results.
	timeout --signal=INT --kill-after=10 $limit "$@"
	code=$?
	echo "== $name: exit status $code after $((SECONDS - start)) s"
	"$PYTHON" mmdyn/analysis/gpu/results.py "$RESULTS" step "$name" $((SECONDS - start)) $code
}

all() {
	# 1. The wheels into a folder of their own, so that the machine's packages stay as they are; mmdyn from this tree.
	step install 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
		--target "$WORK/site" "$KIT"/*.whl
	# Beside transformers 5, which such a machine may have, mmpretrain 1.2 cannot be imported; nobody needs it here.
	mkdir -p "$WORK/site/transformers-0.dist-info"
	printf 'Metadata-Version: 2.1\nName: transformers\nVersion: 0\n' > "$WORK/site/transformers-0.dist-info/METADATA"
	echo 'raise ImportError("gpu_check.sh hides transformers from mmpretrain")' > "$WORK/site/transformers.py"
	step machine 60 "$PYTHON" tools/gpu/machine.py "$RESULTS"
	# 2. Compiled on this machine: for its torch, whatever that is, and its card.
	step operator 75 "$PYTHON" tools/gpu/compile_deformable.py
	# 3. CUDA tests are in files that say so: the others may import what is not installed here. One that hangs ends its
	# process alone.
	step tests-cuda 75 "$PYTHON" "${tests[@]}" $(parallel 4) -o faulthandler_timeout=40 -rs -m cuda \
		--junitxml "$OUT/tests-cuda.xml" $(grep -rl --include 'test_*.py' 'mark\.cuda' tests)
	"$PYTHON" mmdyn/analysis/gpu/results.py "$RESULTS" tests cuda "$OUT/tests-cuda.xml"
	# 4. to 6.
	step benchmark 180 "$PYTHON" tools/gpu/benchmark_cases.py "$RESULTS"
	step trace-pvt 30 "$PYTHON" tools/analysis_tools/profile_pass.py --device cuda --dtype float16 \
		--models PVT-small+DGE --shape 800 1280 --out "$OUT"
	"$PYTHON" mmdyn/analysis/gpu/results.py "$RESULTS" traces "$OUT"
	step trace-deit 30 "$PYTHON" tools/analysis_tools/profile_pass.py --device cuda --dtype float16 \
		--models DeiT-small+DGE --shape 224 224 --out "$OUT"
	"$PYTHON" mmdyn/analysis/gpu/results.py "$RESULTS" traces "$OUT"
	step data 30 "$PYTHON" tools/dataset_tools/make_demo_dataset.py --out "$WORK/digits" --dense-train 1 --dense-val 1
	step training 75 "$PYTHON" tools/gpu/train_amp.py "$RESULTS" --data "$WORK/digits" --work-dir "$WORK/runs"
	# What needs no GPU, with this Python and torch, in the time that is left.
	step kernels 60 "$PYTHON" setup.py -q build_ext --inplace
	step tests-models 75 env CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 "$PYTHON" "${tests[@]}" $(parallel "$(nproc)") \
		-m 'not cuda' --junitxml "$OUT/tests-models.xml" tests/models tests/kernels
	"$PYTHON" mmdyn/analysis/gpu/results.py "$RESULTS" tests models "$OUT/tests-models.xml"
}

all 2>&1 | tee "$OUT/log.txt"
[ -f "$RESULTS" ] && echo "The results are in $RESULTS; the page: $PYTHON tools/gpu/report.py $RESULTS"
