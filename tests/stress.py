"""Long random sequences of fused calls, all ranks on one GPU (loopback) or over a mesh.

    python tests/stress.py --ranks 2 --calls 1000000
    python tests/stress.py --mesh --ranks 2 --calls 100000

Programs of random operation, D, tokens, dtypes and algorithm share workspaces and run in random
order, captured in CUDA graphs or not. A program calls with several sets of inputs in turn; each
result must be, bit for bit and on every rank, what the set's first one was, which the oracles of
the test suite have checked. At the end no workspace has grown in number, and all guard words are
whole.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from cases import BF16, F16, F32, OPS, Case, assert_matches, make_inputs, oracle_float64
from jax.sharding import PartitionSpec as P
from runners import in_specs, make_mesh, mesh_call, place
from tqdm import tqdm

from jax_gemma_arf import extension, support
from jax_gemma_arf.loopback import loopback_tail
from jax_gemma_arf.reference import Operands

SETS = 3
ROUNDS = 20  # of all sets, in one run of a program
GRAPHS = {"xla_gpu_graph_min_graph_size": "1"}
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def random_case(rng: np.random.Generator) -> Case:
    """Any operation, mostly small: decode is where protocols race."""
    op = str(rng.choice(OPS))
    dtype = (BF16, F16, F32)[rng.integers(3)]
    return Case(
        leading=(int(2 ** rng.uniform(0, 9)),),
        hidden=int(rng.choice([256, 640, 1536, 2560, 2816, 5376])),
        dtype=dtype,
        residual_dtype=F32 if rng.random() < 0.2 else None,
        layer_scalar=None if rng.random() < 0.3 else (),
        op=op,
        next_norms=int({"sandwich": rng.integers(1, 4), "moe_tail": rng.integers(4)}.get(op, 0)),
    )


def differ(one: jax.Array, two: jax.Array) -> jax.Array:
    """Whether any bit differs; two is broadcast."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[one.dtype.itemsize]
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jnp.any(cast(one) != cast(two)).astype(jnp.int32)


def repeated(call, inputs, expected):
    """Calls with every set in turn, ROUNDS times; returns how many outputs were wrong."""

    def one_round(_, wrong):
        for i in range(SETS):
            outs = call(jax.tree.map(lambda a: a[i], inputs))
            wrong += sum(differ(out, want[i]) for out, want in zip(outs, expected))
        return wrong

    return jax.lax.fori_loop(0, ROUNDS, one_round, jnp.int32(0))


def check_first(case: Case, ranks: int, outs_of_set) -> None:
    """The first outputs, [N, ..., D] each, against the oracle and across ranks."""
    for seed, outs in enumerate(outs_of_set):
        inputs = make_inputs(dataclass_seed(case, seed), ranks)
        for out, want in zip(outs, oracle_outputs(case, inputs)):
            for rank in range(1, ranks):
                np.testing.assert_array_equal(out[rank].view(np.uint8), out[0].view(np.uint8))
            assert_matches(case, inputs, out[0], want, exact_sum=True)
