"""Every implementation behind one interface: Inputs -> what each rank holds, [N, *leading, D]."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from cases import Case, Inputs
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from jax_gemma_arf.loopback import loopback_post_ff


@dataclasses.dataclass(frozen=True)
class Runner:
    """An implementation at a number of ranks. gpus: how many it needs."""

    name: str
    ranks: int
    gpus: int
    # Whether the rank sum is float32, rounded once, rather than psum's.
    exact_sum: bool
    run: Callable[[Case, Inputs, list[jax.Device]], np.ndarray]

    def __str__(self) -> str:
        return f"{self.name}_{self.ranks}"


def make_mesh(sizes, names, devices, axis_type=AxisType.Auto) -> jax.sharding.Mesh:
    """A mesh whose axes are all of one type."""
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names), devices=devices)


def run_mesh(implementation: str | None, case: Case, inputs: Inputs, devices) -> np.ndarray:
    mesh = make_mesh((len(devices),), ("tp",), devices)
    x, *others = inputs.operands()

    def every_rank(x, *others):
        out = jga.fused_post_ff(
            x[0],
            *others,
            axis_name="tp",
            eps=case.eps,
            scale_offset=case.scale_offset,
            implementation=implementation,
        )
        return out[None]

    specs = (P("tp"), *(P() for _ in others))
    placed = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip((x, *others), specs)]
    mapped = jax.shard_map(every_rank, mesh=mesh, in_specs=specs, out_specs=P("tp"))
    return np.asarray(jax.jit(mapped)(*placed))


def run_loopback(algorithm: str, case: Case, inputs: Inputs, devices) -> np.ndarray:
    call = functools.partial(
        loopback_post_ff, eps=case.eps, scale_offset=case.scale_offset, algorithm=algorithm
    )
    return np.asarray(jax.jit(call)(*jax.device_put(inputs.operands(), devices[0])))


XLA = [
    Runner(name, n, 0, n == 2, functools.partial(run_mesh, implementation))
    for name, implementation in (("xla", "xla"), ("default", None))
    for n in (2, 4, 8)
]
LOOPBACK = [
    Runner(f"loopback_{algorithm}", n, 1, True, functools.partial(run_loopback, algorithm))
    for n in (2, 4, 8)
    for algorithm in ("one_shot", "two_shot")
]
MULTI_GPU = [
    Runner("multi_gpu", n, n, True, functools.partial(run_mesh, "cuda")) for n in (2, 4, 8)
]
