#!/usr/bin/env bash
# Runs the kernel and engine tests on emulated boards, as many at once as there are cores, and
# compares their greedy tokens with this machine's:   run.sh PYTHON [BOARD ...]
# Compiled code is kept in the emulator's folder: the first run takes minutes, the next less.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
python=$1 && shift
[ $# -gt 0 ] || set -- pi5 pi4 zero2 generic
benchmarks/arm/setup.sh
EDGEQ_ARM_TOKENS=$(mktemp -d)
export EDGEQ_ARM_TOKENS
trap 'rm -rf "$EDGEQ_ARM_TOKENS"' EXIT

tests() { # every kind of weights on one board; on the others, those with code of their own
  local kernels="extreme or rows or reductions" engine="greedy or float or memory"
  case $1 in
    pi5) kernels="not cross_compiled" engine="not awkward and not 16-" ;;
    pi4 | zero2)
      kernels="$kernels or w4-g32 or w8-channel or w3-g16-asym"
      engine="$engine or (scheme and w4) or 8-gemma3" ;;
  esac
  local pytest=(benchmarks/arm/armpy "$1" -m pytest -q -p no:cacheprovider)
  "${pytest[@]}" tests/arm tests/runtime/test_thread_pool.py && "${pytest[@]}" tests/runtime/kernels/test_kernels.py -k "$kernels" &&
    "${pytest[@]}" tests/runtime/test_engine.py -k "$engine"
}

board() {
  local log=$EDGEQ_ARM_TOKENS/$1.log start=$SECONDS
  if tests "$1" > "$log" 2>&1; then
    echo "$1: passed in $((SECONDS - start)) s" && grep -h " passed" "$log" | sed 's/^/  /'
  else
    cat "$log" && echo "$1: FAILED" && return 1
  fi
}

echo "greedy tokens on this machine ..."
"$python" -m tests.arm.greedy "$EDGEQ_ARM_TOKENS"
echo "emulated boards: $* ..."
failed=0 running=0
for name in "$@"; do
  if [ $running -ge "$(nproc)" ]; then wait -n || failed=1; running=$((running - 1)); fi
  board "$name" &
  running=$((running + 1))
done
while [ $running -gt 0 ]; do wait -n || failed=1; running=$((running - 1)); done
exit $failed
