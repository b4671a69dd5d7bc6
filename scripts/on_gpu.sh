#!/usr/bin/env bash
# Build zo2ext in place for this machine's GPU, test it, and run as much of the battery as fits.
#
#   scripts/on_gpu.sh OUT MINUTES [EARLIER]
#
# What says the most fits two commands of a quarter of an hour together:
#
#   scripts/on_gpu.sh first 9; scripts/on_gpu.sh second 5 first/rows.tgz
#
# Needs torch, transformers, greenlet, pytest, hypothesis, cmake and ninja, and no network. Without
# EARLIER, the checks that need a GPU run first, in at most half of the time. EARLIER is the rows.tgz
# of an earlier call: the battery continues where that one stopped, and no checks run. ZO2 is a
# checkout of liangyuwang/zo2 to measure too, with the Python PEER_PYTHON. Writes to OUT: build.txt,
# core.txt, tests.txt, battery.txt, battery.json and rows.tgz (with pictures and logs).
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath "$1") minutes=$2 earlier=${3:-}
rows=$(mktemp -d) bad=0
mkdir -p "$out"
left() { echo $((60 * minutes - SECONDS)); }

capability='import torch; print(*torch.cuda.get_device_capability(), sep=".")'
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c "$capability")} || exit
export TORCH_CUDA_ARCH_LIST ZO2EXT_CUDA=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:${PYTHONPATH:-}"
if [ -z "$earlier" ]; then
  {
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native &&
      cmake --build build/gpu --target cuda_check
  } >"$out/core.txt" 2>&1 &
fi
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  python3 -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
  python3 setup.py build_ext --inplace
} >"$out/build.txt" 2>&1 || { tail -n 30 "$out/build.txt"; exit 1; }
echo "built after $SECONDS s"

if [ -z "$earlier" ]; then
  wait %1 && timeout $(($(left) / 5)) ctest --test-dir build/gpu -R '^cuda_check$' \
    --output-on-failure >>"$out/core.txt" 2>&1 || { bad=1; tail -n 30 "$out/core.txt"; }
  echo "C++ check done after $SECONDS s"
  timeout $(($(left) / 3)) python3 -m pytest -q -m gpu --maxfail=20 -p no:cacheprovider \
    tests/engine/test_cuda_engine.py tests >"$out/tests.txt" 2>&1 || bad=1
  tail -n 25 "$out/tests.txt"
  echo "tests done after $SECONDS s"
else
  tar -xzf "$earlier" -C "$rows"
fi

python3 benchmarks/battery.py --minutes "$(python3 -c "print(($(left) - 15) / 60)")" --out "$rows" \
  ${ZO2:+--zo2 "$ZO2"} ${PEER_PYTHON:+--peer-python "$PEER_PYTHON"} 2>&1 | tee "$out/battery.txt" || bad=1
cp "$rows/battery.json" "$out"
tar -czf "$out/rows.tgz" -C "$rows" .
exit $bad
