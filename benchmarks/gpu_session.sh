#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU, PyTorch, Triton and nvcc, and no network: build, tests on the GPU, benchmark,
# profile, compute-sanitizer. Ends within BUDGET seconds (default 580) and leaves everything below OUT.
#
#   OUT=results benchmarks/gpu_session.sh
#   DRY_RUN=1 benchmarks/gpu_session.sh        # the same steps on the emulator, with tiny sizes
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
BUDGET=${BUDGET:-580}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
started=$SECONDS
failed=0

left() { echo $((BUDGET - SECONDS + started)); }

# step NAME SECONDS COMMAND...: at most so long, and never beyond the budget; what fails does not stop the rest.
step() {
    local name=$1 limit=$2
    shift 2
    local rest
    rest=$(left)
    if ((rest < 10)); then
        echo "== $name: skipped, the budget is spent" | tee -a "$OUT/summary.txt"
        return
    fi
    ((limit = limit < rest ? limit : rest))
    local begun=$SECONDS status=0
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    echo "== $name: status $status after $((SECONDS - begun)) s" | tee -a "$OUT/summary.txt"
    if ((status != 0)); then
        failed=1
        tail -n 15 "$OUT/$name.log"
    fi
}

: >"$OUT/summary.txt"
if ! "$PYTHON" -c 'import fuser' 2>/dev/null; then
    # No network: the packages that it needs must be there; only fuser itself is installed.
    step install 60 "$PYTHON" -m pip install --no-deps --no-build-isolation --no-index .
fi
export FUSER_CACHE_DIR=${FUSER_CACHE_DIR:-$OUT/cache}
mkdir -p -m 700 "$FUSER_CACHE_DIR"

if [[ -n ${DRY_RUN:-} ]]; then
    step primitives 200 "$PYTHON" benchmarks/gpu_primitives.py --emulated
    step benchmark 300 "$PYTHON" benchmarks/gpu.py --emulated --dtypes fp16 --masks dense longformer \
        --output "$OUT/gpu.json" --document "$OUT/gpu.md" --profile "$OUT/profile.txt"
else
    step machine 20 nvidia-smi -q
    if [[ -d tests/gpu ]]; then
        step tests 150 "$PYTHON" -m pytest -q tests/gpu
    fi
    step primitives 60 "$PYTHON" benchmarks/gpu_primitives.py
    step benchmark 240 "$PYTHON" benchmarks/gpu.py --budget 200 --dtypes fp16 \
        --peers eager compile flex cudnn flash "compile reduce-overhead" \
        --output "$OUT/gpu.json" --document "$OUT/gpu.md" --profile "$OUT/profile.txt"
    if command -v compute-sanitizer >/dev/null; then
        # The races that the emulator looks for, as the hardware sees them.
        for tool in memcheck racecheck; do
            step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$PYTHON" benchmarks/gpu_primitives.py
        done
    else
        echo "== sanitizer: compute-sanitizer is not installed" | tee -a "$OUT/summary.txt"
    fi
    if command -v ncu >/dev/null; then
        step ncu 60 ncu --set basic --launch-count 20 -o "$OUT/ncu" --force-overwrite \
            "$PYTHON" benchmarks/gpu.py --parts encoders --models bert-base --shapes 8x512 --masks dense --dtypes fp16 \
            --peers --rounds 1 --output "$OUT/ncu.json"
    fi
fi
cat "$OUT/summary.txt"
exit "$failed"
