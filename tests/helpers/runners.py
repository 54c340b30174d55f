"""Every implementation behind one interface: Inputs -> what each rank holds, [N, *leading, D] for
hidden and each next norm."""

import dataclasses
import doctest
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.cases import OPS, Case, Inputs
from jax_gemma_arf._src.operands import TWO_BRANCHES, Operands
from jax_gemma_arf.loopback import loopback_tail

PER_RANK, REPLICATED = P("tp"), P()


@dataclasses.dataclass(frozen=True)
class Runner:
    """An implementation at a number of ranks. gpus: how many it needs."""

    name: str
    ranks: int
    gpus: int
    # Whether the rank sum is float32, rounded once, rather than psum's.
    exact_sum: bool
    run: Callable[[Case, Inputs, list[Any]], list[np.ndarray]]
    ops: tuple[str, ...] = OPS
    flashinfer: bool = False

    def __str__(self) -> str:
        return f"{self.name}_{self.ranks}"


def make_mesh(sizes, names, devices, axis_type=AxisType.Auto) -> jax.sharding.Mesh:
    """A mesh whose axes are all of one type."""
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names), devices=devices)


def call_op(case: Case, inputs: Inputs, **options) -> tuple[jax.Array, ...]:
    """The public operation of the case, inside shard_map. Returns hidden and the next norms.

    inputs hold this rank's partial sums. A single next norm's scale is given as an array, several
    as a tuple.
    """
    residual = [] if inputs.residual is None else [inputs.residual]
    scalar = [] if inputs.layer_scalar is None else [inputs.layer_scalar]
    scales, next_scales = inputs.norm_scales, inputs.next_norm_scales
    if case.branches == 2:
        options |= zip(TWO_BRANCHES.scales, scales)
        scales = ()
    if next_scales:
        options["next_norm_scale"] = next_scales[0] if len(next_scales) == 1 else next_scales
    outputs = getattr(jga, f"fused_{case.op}")(
        *inputs.partial_sums, *residual, *scales, *scalar, **options
    )
    return tuple(jax.tree.leaves(outputs))


def in_specs(case: Case, partial=PER_RANK, rows=REPLICATED) -> Inputs:
    """Specs of the case's inputs: partial sums [N, ..., D], residual; the rest is replicated."""
    return Inputs(
        partial_sums=(partial,) * case.branches,
        norm_scales=(P(),) * (2 * case.branches - 1),
        residual=rows if case.has_residual else None,
        layer_scalar=P() if case.has_layer_scalar else None,
        next_norm_scales=(P(),) * case.next_norms,
    )


def place[T](mesh: jax.sharding.Mesh, tree: T, specs: Any) -> T:
    """Arrays on the devices of a mesh."""
    return jax.tree.map(
        lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec)), tree, specs
    )


def one_rank(inputs: Inputs) -> Inputs:
    """Inside a shard_map by in_specs: this rank's partial sums, without their axis of ranks."""
    return inputs._replace(partial_sums=tuple(x[0] for x in inputs.partial_sums))


def mesh_call(
    case: Case,
    mesh,
    *,
    specs=None,
    out_specs=REPLICATED,
    check_vma=True,
    every_rank=False,
    **options,
):
    """The case's operation over a mesh: from Inputs with all ranks' sums to hidden and next norms.

    every_rank: what each rank holds, [N, ..., D], for out_specs=PER_RANK.
    """
    options = {"axis_name": "tp", "eps": case.eps, "scale_offset": case.scale_offset} | options

    def local(inputs):
        outputs = call_op(case, one_rank(inputs), **options)
        return tuple(out[None] for out in outputs) if every_rank else outputs

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(in_specs(case) if specs is None else specs,),
        out_specs=out_specs,
        check_vma=check_vma,
    )


def run_mesh(implementation: str | None, case: Case, inputs: Inputs, devices) -> list[np.ndarray]:
    mesh = make_mesh((len(devices),), ("tp",), devices)
    call = mesh_call(case, mesh, out_specs=PER_RANK, every_rank=True, implementation=implementation)
    return [np.asarray(out) for out in jax.jit(call)(place(mesh, inputs, in_specs(case)))]


def run_loopback(case: Case, inputs: Inputs, devices=None, **options) -> list[np.ndarray]:
    """loopback_tail's options besides; devices: the GPU, or None for JAX's default device."""
    call = functools.partial(loopback_tail, eps=case.eps, scale_offset=case.scale_offset, **options)
    operands = jax.device_put(Operands(*inputs), devices[0] if devices else None)
    return [np.asarray(out) for out in jax.jit(call)(operands)]


XLA = [
    Runner("xla", 2, 0, True, functools.partial(run_mesh, "xla")),
    Runner("default", 4, 0, False, functools.partial(run_mesh, None)),
    Runner("xla", 8, 0, False, functools.partial(run_mesh, "xla")),
]
LOOPBACK = [
    Runner(
        f"loopback_{algorithm}", n, 1, True, functools.partial(run_loopback, algorithm=algorithm)
    )
    for n in (2, 4, 8)
    for algorithm in ("one_shot", "two_shot")
]
ONE_MESSAGE_OPS = tuple(op for op in OPS if op != "moe_tail")
FLASHINFER = [
    Runner(
        f"loopback_flashinfer_{algorithm}",
        n,
        1,
        True,
        functools.partial(run_loopback, algorithm=algorithm, implementation="flashinfer"),
        ONE_MESSAGE_OPS,
        flashinfer=True,
    )
    for n in (2, 4, 8)
    for algorithm in ("one_shot", "two_shot")
]
MULTI_GPU_FLASHINFER = [
    Runner(
        "multi_gpu_flashinfer",
        n,
        n,
        True,
        functools.partial(run_mesh, "flashinfer"),
        ONE_MESSAGE_OPS,
        flashinfer=True,
    )
    for n in (2, 4, 8)
]
MULTI_GPU = [
    Runner("multi_gpu", n, n, True, functools.partial(run_mesh, "cuda")) for n in (2, 4, 8)
]


def check_docstring_example(documented: Any, **names: Any) -> None:
    """Runs a docstring's example, with the names that docs/reference/operations.md introduces."""
    names |= {"jax": jax, "jnp": jnp, "P": P, "functools": functools}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(documented, documented.__name__, globs=names)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)
