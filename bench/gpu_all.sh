#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, in under 10 minutes: bench/gpu_all.sh [OUT]
#   1. the kernel tests, compiled (bf16 included)            at most 4.5 minutes
#   2. every kernel beside its limit and its peers           at most 5 minutes
# Fixtures come from tests/fixtures, nothing from outside the repository. OUT (default bench/results) gets
# kernels-<device>.json, .md and .png and gpu-tests.txt. bitsandbytes is measured where it is installed.
# bench/gpu_all.sh --dry-run runs step 2 at tiny sizes on a CPU, into a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = --dry-run ]; then
    exec "$python" -m bench.bench_kernels --dry-run --out "$(mktemp -d)"
fi
out=${1:-bench/results}
mkdir -p "$out"
unset TRITON_INTERPRET LOWRANK_KERNELS
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here: bench/gpu_all.sh --dry-run"' || exit 1
status=0
timeout 270 "$python" -m pytest tests/kernels -k "not aot" -p no:cacheprovider 2>&1 | tee "$out/gpu-tests.txt" | tail -n 25
[ "${PIPESTATUS[0]}" = 0 ] || status=1
timeout 300 "$python" -m bench.bench_kernels --out "$out" || status=1
exit $status
