"""Shows which programs keep the kernels of a process from overlapping.

    bench/overlap.py loop psum loop        # programs, run one after the other in this process

Each program is the same loop, 20 matmuls with a norm after each, with something in its middle. A
loop that overlaps before a program and not behind it has found what ends it. XLA_FLAGS and the like
are the caller's.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import xplane
from jax.sharding import PartitionSpec as P

from jax_gemma_arf import rmsnorm

WIDTH, MATMULS, ITERATIONS = 1536, 20, 16

#: What is in the middle of each program: [2, WIDTH] to the same.
MIDDLES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "loop": lambda x: x,
    "psum": lambda x: jax.lax.psum(x, "tp") / jax.lax.axis_size("tp"),
    "all_gather": lambda x: jax.lax.all_gather(x, "tp")[0],
    "axis_index": lambda x: x + jax.lax.axis_index("tp") / 1024,
    "sort": lambda x: x + jnp.sort(x, axis=-1)[:, :1] / 1024,
}


def program(middle: Callable[[jax.Array], jax.Array], mesh: jax.sharding.Mesh):
    """A jitted function of [2, WIDTH] and the weights, [MATMULS] x [WIDTH, WIDTH]."""

    def half(x, weights):
        for w in weights:
            x += rmsnorm(x @ w, jnp.ones(WIDTH))
        return x

    def iteration(_, carry):
        x, weights = carry
        x = half(x, weights[: MATMULS // 2])
        x = middle(x).astype(x.dtype)
        return half(x, weights[MATMULS // 2 :]), weights

    def loop(x, weights):
        return jax.lax.fori_loop(0, ITERATIONS, iteration, (x, weights))[0]

    # What varies over the ranks is not tracked: the sum of equal rows is wanted here.
    return jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows what keeps kernels from overlapping.")
    parser.add_argument("programs", nargs="+", choices=MIDDLES)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    _, devices = common.devices_for(0)
    mesh = common.tp_mesh(devices)
    whole = jax.NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(0), MATMULS)
    weights = [jax.random.normal(key, (WIDTH, WIDTH), jnp.bfloat16) for key in keys]
    operands = jax.device_put((jnp.ones((2, WIDTH), jnp.bfloat16), weights), whole)
    # Compiled before anything runs, since the compiler tries kernels out on the GPUs.
    compiled = {
        name: program(MIDDLES[name], mesh).lower(*operands).compile()
        for name in dict.fromkeys(arguments.programs)
    }
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}\n")
    print("| program | us an iteration | kernels that overlap |\n| --- | ---: | ---: |")
    clock = common.Clock(mesh, arguments.repeats)
    for name in arguments.programs:
        call = functools.partial(compiled[name], *operands)
        step = statistics.median(clock.microseconds(call, ITERATIONS))
        shares = [f"{xplane.overlap(kernels):.0%}" for kernels in xplane.traced(call).values()]
        print(f"| {name} | {step:.0f} | {', '.join(shares) or '-'} |")


if __name__ == "__main__":
    main()
