"""A small selection of loopback calls, a few seconds' worth, for compute-sanitizer: tests/gpu.sh
sanitize runs them under each of its tools.

The ranks' kernels wait for each other, so they must run at the same time, as by default; with
--force-blocking-launches the first of them ends after the peer timeout.
"""

import argparse
import functools
import os
import time

# Tools that keep a record of every byte on the device would keep it of JAX's whole pool.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import jax_gemma_arf as jga
from helpers.cases import F16, F32, Case, assert_matches, make_inputs
from helpers.runners import ONE_MESSAGE_OPS
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

MAX_CTAS = 8
CASES = (
    # A partial warp, and fewer rows than blocks.
    Case((3,), 640),
    # Blocks that walk over several rows, also of two-shot with 4 ranks; all next norms.
    Case((4 * MAX_CTAS + 5,), 640, op="sandwich", next_norms=3),
    Case((4 * MAX_CTAS + 5,), 2816, op="moe_tail", next_norms=1),
    # Clusters of two blocks, which walk too.
    Case((2 * MAX_CTAS + 1,), 5376, F32, op="sandwich", next_norms=1),
    Case((2 * MAX_CTAS + 1,), 5376, F32, op="moe_tail"),
    # Without a residual; and results wider than the partial sums, for which two-shot's rows must
    # have room.
    Case((9,), 1152, op="all_reduce_norm"),
    Case((9,), 640, F16, residual_dtype=F32, op="sandwich", next_norms=1),
)


def check(case: Case, ranks: int, algorithm: str, implementation: str) -> None:
    inputs = make_inputs(case, ranks)
    operands = jax.tree.map(jnp.asarray, Operands(*inputs))
    options = {"algorithm": algorithm, "max_ctas": MAX_CTAS, "implementation": implementation}
    call = jax.jit(functools.partial(loopback_tail, **options))
    for _ in range(3):  # both generations of slots, and the first again
        outputs = [np.asarray(out) for out in call(operands)]
        for rank in range(ranks):
            assert_matches(case, inputs, [out[rank] for out in outputs], exact_sum=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A selection of calls for compute-sanitizer.")
    parser.add_argument("--implementation", choices=("cuda", "flashinfer"), default="cuda")
    implementation = parser.parse_args().implementation
    cases = CASES
    if implementation == "flashinfer":
        cases = [case for case in CASES if case.op in ONE_MESSAGE_OPS]
    jga.set_peer_timeout(60)  # much longer than a checked kernel takes
    start = time.monotonic()
    for ranks in (2, 4):
        for algorithm in ("one_shot", "two_shot"):
            for case in cases:
                check(case, ranks, algorithm, implementation)
                seconds = time.monotonic() - start
                print(f"{seconds:5.1f} s: {ranks} ranks, {algorithm}, {case}: right", flush=True)
    assert {part.damage for part in jga.workspaces()} == {""}


if __name__ == "__main__":
    main()
