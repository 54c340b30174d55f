#!/usr/bin/env bash
# Everything that needs GPUs, on a machine that has the package installed: what the machine is, the
# loopback and multi_gpu tests, compute-sanitizer on a selection, and the benchmarks. Each step has
# a time limit, since a kernel that spins for a peer might not end by itself.
#
#   tests/gpu.sh [report|test|stress|sanitize|speed|op|ops|block|model|tunix|quick]...
#
# speed is op, ops, block and model, and the demo; quick is a short run of the benchmarks; the
# default is all but tunix and quick. model and tunix need the packages, or copies (gather.py).
# Records and plots go to $OUT, else to bench/records. COMMIT names the commit where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
gpus=$(nvidia-smi -L | wc -l)
failed=0
step() { # SECONDS COMMAND...
  echo "== ${*:2}"
  timeout -k 10 "$@" || { echo "== failed with status $?: ${*:2}"; failed=1; }
}

model() {  # SECONDS ARGUMENT...; where the gemma package is
  if python3 -c "import gemma.gm" 2> /dev/null; then
    step "$1" python3 bench/model.py "${@:2}"
  fi
}

has_flashinfer() { python3 -P -c "import jax_gemma_arf._flashinfer" 2> /dev/null; }

run_report() { step 60 python3 -P -m jax_gemma_arf; }  # -P: the installed package, not this tree
run_test() {  # in processes of their own: loopback fills a GPU with the workspaces of all ranks
  # 1569 tests, each compiled for itself. Several processes can share a GPU here, since a launch in
  # loopback holds all ranks that wait for each other. pytest-benchmark objects to processes.
  step 600 pytest -q -p no:benchmark --numprocesses "$(nproc)" --maxprocesses 14 -k loopback \
    tests/test_tails.py
  step 600 pytest -q -k loopback --ignore tests/test_tails.py tests
  step 600 pytest -q -k multi_gpu tests
  JAX_GEMMA_ARF_RECORD=0 step 600 pytest -q -k "multi_gpu or neighbours" tests
}
run_stress() {
  local ranks
  for ranks in 2 4 8; do
    step 300 python3 tests/stress.py --ranks "$ranks" --calls 1000000 --seconds 200
  done
  if ((gpus > 1)); then
    step 300 python3 tests/stress.py --mesh --calls 1000000 --seconds 200
  fi
  if has_flashinfer; then
    for ranks in 2 4 8; do
      step 120 python3 tests/stress.py --implementation flashinfer --ranks "$ranks" \
        --calls 1000000 --seconds 60
    done
    if ((gpus > 1)); then
      step 120 python3 tests/stress.py --implementation flashinfer --mesh --calls 1000000 --seconds 60
    fi
  fi
}
run_sanitize() {
  local tool
  for tool in memcheck racecheck initcheck synccheck; do
    step 180 compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kns=FusedTail \
      python3 tests/sanitize.py
    if has_flashinfer; then
      step 180 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --kernel-name kns=allreduce_fusion python3 tests/sanitize.py --implementation flashinfer
    fi
  done
}
run_op() {  # loopback where there is one GPU, here and below
  step 420 python3 bench/op.py --ops post_ff second_norm --hidden 5376
}
run_ops() {
  step 240 python3 bench/op.py --ops sandwich all_reduce_norm moe_tail --hidden 5376 \
    --tokens 1 16 128 1024 4096 --flag-sets A C
}
run_block() {
  step 300 python3 bench/block.py --models 31B E4B --tokens 1 16 128 1024 --flag-sets A C
  step 120 python3 bench/profile_compare.py
}
run_model() {  # each model in a process of its own, which loses its later rows after 150 s
  model 480 --models Gemma4_E2B Gemma4_E4B Gemma3_4B --child-seconds 150
  model 330 --models Gemma4_26B_A4B Gemma4_31B --child-seconds 150
}
run_tunix() { step 270 python3 bench/tunix_gemma.py; }
run_speed() { run_op; run_ops; run_block; run_model; step 120 python3 examples/demo.py; }
run_quick() {
  step 90 python3 bench/op.py --quick
  step 90 python3 bench/block.py --quick
  step 90 python3 bench/profile_compare.py --quick
  model 90 --quick
}

for part in "${@:-all}"; do
  case "$part" in
    all) run_report; run_test; run_stress; run_sanitize; run_speed ;;
    report | test | stress | sanitize | speed | op | ops | block | model | tunix | quick) "run_$part" ;;
    *) echo "unknown part: $part; use one of those at the top of this script" >&2; exit 2 ;;
  esac
done
exit "$failed"
