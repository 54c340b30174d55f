#!/usr/bin/env bash
# Everything that needs GPUs, on a machine that has the package installed: what the machine is, the
# loopback and multi_gpu tests, compute-sanitizer on a selection, and the benchmarks. Each step has
# a time limit, since a kernel that spins for a peer might not end by itself.
#
#   bench/gpu.sh [report|test|sanitize|speed|quick]...      default: all but quick
#
# Records and plots go to $OUT, else to bench/records. COMMIT names the commit where there is no git.
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
  step 300 pytest -q -k loopback tests
  step 300 pytest -q -k multi_gpu tests
}
run_sanitize() {
  local tool
  for tool in memcheck racecheck; do
    step 180 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 tests/sanitize.py
  done
}
run_speed() {  # loopback where there is one GPU
  if ((gpus > 1)); then
    step 420 python3 bench/op.py --ops post_ff --hidden 5376
    step 240 python3 bench/op.py --ops sandwich all_reduce_norm moe_tail --hidden 5376 \
      --tokens 1 16 128 1024 4096 --flag-sets A C
    step 240 python3 bench/block.py --models 31B E4B --tokens 1 16 128 1024 --flag-sets A C
  else
    step 180 python3 bench/op.py --ops post_ff --hidden 5376
    step 150 python3 bench/op.py --ops sandwich all_reduce_norm moe_tail --hidden 5376 \
      --tokens 1 16 128 1024
    step 150 python3 bench/block.py --models 31B --tokens 1 16 128 1024
  fi
  step 120 python3 bench/profile_compare.py
  step 120 python3 examples/demo.py
}
run_quick() {
  step 90 python3 bench/op.py --quick
  step 90 python3 bench/block.py --quick
  step 90 python3 bench/profile_compare.py --quick
}

for part in "${@:-all}"; do
  case "$part" in
    all) run_report; run_test; run_sanitize; run_speed ;;
    report | test | sanitize | speed | quick) "run_$part" ;;
    *) echo "unknown part: $part; use report, test, sanitize, speed or quick" >&2; exit 2 ;;
  esac
done
exit "$failed"
