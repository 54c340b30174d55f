"""Times fused_post_ff against psum + tail: all ranks on one GPU (loopback) or over a mesh of GPUs.

Every number is the wall time of a chain of dependent calls inside one jit, divided by its length,
median over repeats with the spread, on random data. A chain of 50 runs as a CUDA graph, so on a GPU
this is kernel time plus the gaps inside the graph. Each timed configuration is checked against the
psum implementation (mesh) or the float32 tail (loopback) first.
"""

import argparse
import functools
import statistics
import time
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from jax_gemma_arf import support
from jax_gemma_arf.loopback import loopback_post_ff
from jax_gemma_arf.reference import post_ff_tail

TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def timed(call, *operands, chain: int, repeats: int = 15, runs: int = 5) -> tuple[float, float]:
    """Median and half the interquartile range of microseconds per link of the chain."""
    for _ in range(4):
        jax.block_until_ready(call(*operands))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(runs):  # one output alive at a time, so that its buffer stays in place
            out = call(*operands)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / (runs * chain) * 1e6)
    low, middle, high = statistics.quantiles(samples, n=4)
    return middle, (high - low) / 2


def inputs(ranks: int, tokens: int, hidden: int) -> list[jax.Array]:
    """x [N, tokens, D], residual, norm_scale, layer_scalar in bfloat16."""
    keys = jax.random.split(jax.random.key(tokens), 3)
    bf16 = jnp.bfloat16
    return [
        jax.random.normal(keys[0], (ranks, tokens, hidden), bf16),
        jax.random.normal(keys[1], (tokens, hidden), bf16),
        1 + jax.random.normal(keys[2], (hidden,), bf16) / 8,
        jnp.asarray(0.5, bf16),
    ]


def loopback_chain(algorithm: str | None, chain: int, max_ctas: int = 0):
    """Each link's partial sums are the last link's outputs, so that nothing runs in between."""

    @jax.jit
    def run(x, residual, norm_scale, layer_scalar):
        for _ in range(chain):
            x = loopback_post_ff(
                x, residual, norm_scale, layer_scalar, algorithm=algorithm, max_ctas=max_ctas
            )
        return x

    return run


def mesh_chain(mesh: jax.sharding.Mesh, implementation: Literal["cuda", "xla"], chain: int):
    """As loopback_chain, over a mesh: no link's sum can be shared or hoisted."""

    def local(x, *others):
        call = functools.partial(jga.fused_post_ff, axis_name="tp", implementation=implementation)
        x = x[0]
        for _ in range(chain):
            x = jax.lax.pcast(call(x, *others), "tp", to="varying")
        return x[None]

    specs = (P("tp"), P(), P(), P())
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("tp")))


def check(out: jax.Array, want: jax.Array) -> None:
    """After a chain of bfloat16 steps, each rounded."""
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(want, np.float32), rtol=2**-5, atol=2**-4
    )


def want_chain(x, residual, norm_scale, layer_scalar, chain: int) -> jax.Array:
    """loopback_chain with the float32 rank sum and tail."""
    for _ in range(chain):
        summed = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in x))
        out = post_ff_tail(summed.astype(x.dtype), residual, norm_scale, layer_scalar)
        x = jnp.broadcast_to(out, x.shape)
    return x


def loopback(ranks: int, hidden: int, tokens: int, chain: int) -> dict[str, tuple[float, float]]:
    """Both algorithms, all ranks on one GPU."""
    operands = inputs(ranks, tokens, hidden)
    want = jax.jit(functools.partial(want_chain, chain=chain))(*operands)
    results = {}
    for algorithm in ("one_shot", "two_shot"):
        call = loopback_chain(algorithm, chain)
        check(call(*operands), want)
        results[algorithm] = timed(call, *operands, chain=chain)
    results["one_shot again"] = timed(loopback_chain("one_shot", chain), *operands, chain=chain)
    return results


def mesh(ranks: int, hidden: int, tokens: int, chain: int) -> dict[str, tuple[float, float]]:
    """psum + tail, and both algorithms, over `ranks` GPUs."""
    devices = jax.devices()[:ranks]
    tp = jax.make_mesh((ranks,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    operands = [
        jax.device_put(a, jax.NamedSharding(tp, P("tp") if i == 0 else P()))
        for i, a in enumerate(inputs(ranks, tokens, hidden))
    ]
    psum = mesh_chain(tp, "xla", chain)
    want = psum(*operands)
    results = {"psum": timed(psum, *operands, chain=chain)}
    for algorithm in ("one_shot", "two_shot"):
        with mock.patch.object(support, "choose_algorithm", lambda *_, name=algorithm: name):
            call = mesh_chain(tp, "cuda", chain)
            check(call(*operands), want)
        results[algorithm] = timed(call, *operands, chain=chain)
    results["psum again"] = timed(psum, *operands, chain=chain)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Times fused_post_ff against psum.")
    parser.add_argument("--mode", choices=("loopback", "mesh"), default="loopback")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, nargs="+", default=[5376])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--chain", type=int, default=50)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {arguments.mode}, bfloat16, us")
    for hidden in arguments.hidden:
        for tokens in arguments.tokens:
            measure = loopback if arguments.mode == "loopback" else mesh
            results = measure(arguments.ranks, hidden, tokens, arguments.chain)
            columns = "  ".join(
                f"{name} {middle:8.2f} +-{spread:5.2f}"
                for name, (middle, spread) in results.items()
            )
            print(f"N {arguments.ranks} D {hidden:5} tokens {tokens:5}: {columns}", flush=True)


if __name__ == "__main__":
    main()
