#!/usr/bin/env bash
# Everything that needs GPUs, on a machine that has the package installed: what the machine is, the
# loopback and multi_gpu tests, compute-sanitizer on a selection, and timings. Each step has a time
# limit, since a kernel that spins for a peer would not end by itself.
#
#   bench/gpu.sh [report|test|sanitize|speed]...      default: all
set -uo pipefail
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi -L | wc -l)
failed=0
step() { # SECONDS COMMAND...
  echo "== ${*:2}"
  timeout -k 10 "$@" || { echo "== failed with status $?: ${*:2}"; failed=1; }
}

run_report() { step 60 python3 -P -m jax_gemma_arf; }  # -P: the installed package, not this tree
run_test() {  # in processes of their own: loopback fills a GPU with the workspaces of all ranks
  step 600 pytest -q -k loopback tests
  step 600 pytest -q -k multi_gpu tests
}
run_sanitize() {
  local tool
  for tool in memcheck racecheck initcheck; do
    step 180 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 tests/sanitize.py
  done
}
run_speed() {
  step 120 python3 bench/op.py --mode loopback --ranks 2 --tokens 1 16 64 256 1024
  if ((gpus > 1)); then
    step 200 python3 bench/op.py --mode mesh --ranks 2 --hidden 5376 2560
  fi
  step 120 python3 examples/demo.py
}

for part in "${@:-all}"; do
  case "$part" in
    all) run_report; run_test; run_sanitize; run_speed ;;
    report | test | sanitize | speed) "run_$part" ;;
    *) echo "unknown part: $part; use report, test, sanitize or speed" >&2; exit 2 ;;
  esac
done
exit "$failed"
