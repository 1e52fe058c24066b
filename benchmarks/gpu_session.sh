#!/usr/bin/env bash
# One go on a machine with an NVIDIA GPU, PyTorch, Triton and nvcc, and no network: build, tests on the GPU, benchmark,
# profile, compute-sanitizer. Ends within BUDGET seconds (default 580) and leaves everything below OUT.
#
#   OUT=results benchmarks/gpu_session.sh
#   STEPS=benchmark benchmarks/gpu_session.sh  # measures the cases that OUT/gpu.json lacks, or benchmarks/results/gpu.json
#   DRY_RUN=1 benchmarks/gpu_session.sh        # the same steps on the emulator, with tiny sizes
#
# STEPS: some of machine tests primitives benchmark sanitizer ncu. Put gpu.json into benchmarks/results/ afterwards, and
# `python benchmarks/gpu.py --tables` writes docs/gpu.md.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
BUDGET=${BUDGET:-580}
PYTHON=${PYTHON:-python}
STEPS=${STEPS:-machine tests primitives benchmark sanitizer ncu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
started=$SECONDS
failed=0

left() { echo $((BUDGET - SECONDS + started)); }
wanted() { [[ " $STEPS " == *" $1 "* ]]; }

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
    return "$status"
}

: >"$OUT/summary.txt"
# The folder fuser here is not the package, which has the folders beside it as well.
if ! "$PYTHON" -c 'import sys; sys.path.pop(0); import fuser.kernels' 2>/dev/null; then
    # No network: the packages that it needs must be there; only fuser itself is installed.
    step install 60 "$PYTHON" -m pip install --no-deps --no-build-isolation --no-index .
fi
export FUSER_CACHE_DIR=${FUSER_CACHE_DIR:-$PWD/build/gpu-cache}
mkdir -p -m 700 "$FUSER_CACHE_DIR"

if [[ ! -e $OUT/gpu.json && -e benchmarks/results/gpu.json && -z ${DRY_RUN:-} ]]; then
    cp benchmarks/results/gpu.json "$OUT/gpu.json"
fi

if [[ -n ${DRY_RUN:-} ]]; then
    wanted primitives && step primitives 200 "$PYTHON" benchmarks/gpu_primitives.py --emulated
    wanted benchmark && step benchmark 300 "$PYTHON" benchmarks/gpu.py --emulated --dtypes fp16 --masks dense longformer \
        --output "$OUT/gpu.json" --document "$OUT/gpu.md" --profile "$OUT/profile.txt"
else
    wanted machine && step machine 20 nvidia-smi -q
    wanted primitives && step primitives 60 "$PYTHON" benchmarks/gpu_primitives.py
    wanted tests && step tests 120 "$PYTHON" -m pytest -q tests/gpu
    if wanted benchmark; then
        # What comes after it needs so long; it ends by itself before it is ended.
        later=15
        wanted sanitizer && ((later += 60))
        wanted ncu && ((later += 45))
        workers=$(($(nproc) / 2))
        # A kernel that crashes takes its process along; the next one goes on with the other cases.
        for name in benchmark benchmark-again; do
            seconds=$(($(left) - later))
            ((seconds > 60)) || break
            step "$name" "$((seconds + 10))" "$PYTHON" benchmarks/gpu.py --budget "$seconds" \
                --workers "$((workers < 8 ? workers : 8))" --output "$OUT/gpu.json" --document "$OUT/gpu.md" \
                --profile "$OUT/profile.txt" && break
        done
    fi
    if wanted sanitizer; then
        if command -v compute-sanitizer >/dev/null; then
            # The races that the emulator looks for, as the hardware sees them.
            for tool in memcheck racecheck; do
                step "sanitizer-$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                    "$PYTHON" benchmarks/gpu_primitives.py
            done
        else
            echo "== sanitizer: compute-sanitizer is not installed" | tee -a "$OUT/summary.txt"
        fi
    fi
    if wanted ncu && command -v ncu >/dev/null; then
        step ncu 60 ncu --set basic --launch-count 20 -o "$OUT/ncu" --force-overwrite \
            "$PYTHON" benchmarks/gpu.py --parts encoders --models bert-base --shapes 8x512 --masks dense --dtypes fp16 \
            --peers --rounds 1 --output "$OUT/ncu.json"
    fi
fi
cat "$OUT/summary.txt"
exit "$failed"
