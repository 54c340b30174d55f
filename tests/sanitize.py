"""A small selection of loopback calls, to run under compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool initcheck --error-exitcode 1 python tests/sanitize.py
"""

from cases import BF16, F16, F32, Case, assert_matches, make_inputs
from runners import run_loopback

# A partial warp (640), several warps, and a cluster of two blocks (5376 in float32); more tokens
# than blocks, so that blocks loop.
CASES = (Case((5,), 640), Case((20,), 2816), Case((9,), 5376, F32), Case((3,), 640, BF16, F32))
CASES += (
    Case((9,), 2816, op="sandwich", next_norms=3),
    Case((9,), 2816, op="all_reduce_norm"),
    Case((9,), 2816, op="moe_tail", next_norms=1),
    # Results wider than the partial sums, which two-shot's rows must have room for.
    Case((9,), 640, F16, residual_dtype=F32, op="sandwich", next_norms=1),
)


def main() -> None:
    for ranks in (2, 4):
        for algorithm in ("one_shot", "two_shot"):
            for case in CASES:
                inputs = make_inputs(case, ranks)
                for _ in range(3):  # both generations of slots, and the first again
                    outputs = run_loopback(case, inputs, algorithm=algorithm, max_ctas=8)
                assert_matches(case, inputs, [out[0] for out in outputs], exact_sum=True)
                print(f"{ranks} ranks, {algorithm}, {case}: right", flush=True)


if __name__ == "__main__":
    main()
