"""A small selection of loopback calls, to run under compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import BF16, F32, Case, assert_matches, make_inputs, oracle_float64

from jax_gemma_arf.loopback import loopback_post_ff

# A partial warp (640), several warps, and a cluster of two blocks (5376 in float32); more tokens
# than blocks, so that blocks loop.
CASES = (Case((5,), 640), Case((20,), 2816), Case((9,), 5376, F32), Case((3,), 640, BF16, F32))


def main() -> None:
    for ranks in (2, 4):
        for algorithm in ("one_shot", "two_shot"):
            for case in CASES:
                inputs = make_inputs(case, ranks)
                call = functools.partial(loopback_post_ff, algorithm=algorithm, max_ctas=8)
                placed = [jnp.asarray(operand) for operand in inputs.operands()]
                for _ in range(4):  # all three Lamport generations, and the first again
                    out = np.asarray(jax.jit(call)(*placed))
                expected = oracle_float64(case, inputs)
                assert_matches(case, inputs, out[0], expected, exact_sum=True)
                print(f"{ranks} ranks, {algorithm}, {case}: right", flush=True)


if __name__ == "__main__":
    main()
