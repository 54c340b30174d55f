"""The primitive behind the fused operations: its type, derivative and batching, and its lowering to
one FFI call on CUDA or to the reference anywhere else."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_gemma_arf._src.decision import DELIBERATE, FallbackCode, Objection, decide
from jax_gemma_arf._src.mesh import replica_groups
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf._src.reference import reference_tail, tail

logger = logging.getLogger("jax_gemma_arf")

#: Name of the custom call that a fused operation becomes on CUDA, in StableHLO and HLO, unless
#: implementation is "flashinfer".
TARGET_NAME = "jax_gemma_arf.tail"
LOOPBACK_TARGET = "jax_gemma_arf.loopback_tail"
#: The targets of each implementation, for a mesh and for loopback.
TARGETS = {
    "cuda": (TARGET_NAME, LOOPBACK_TARGET),
    "flashinfer": ("jax_gemma_arf.flashinfer_tail", "jax_gemma_arf.flashinfer_loopback_tail"),
}
#: For ``jax.export.export(disabled_checks=...)``: JAX exports no custom call that it does not know
#: unless told by name. The name and the attributes of the call may change with the version.
DISABLED_EXPORT_CHECKS = [
    export.DisabledSafetyCheck.custom_call(mesh_target) for mesh_target, _ in TARGETS.values()
]

#: Names the all-reduced rows that a derivative saves, for policies of ``jax.checkpoint``: with
#: ``save_only_these_names(SAVED_SUMS)`` a backward pass does not repeat the all-reduce.
SAVED_SUMS = "jax_gemma_arf.sums"

# Operands: the leaves of an Operands. Parameters: tree, what its leaves are, and options. Results:
# hidden and the next norms.
tail_p = Primitive("fused_tail")
tail_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of a call, besides which operands there are."""

    axis_name: tuple[str, ...]
    eps: float
    scale_offset: float
    implementation: str | None  # "cuda", "flashinfer" or None


def fused_tail(options: Options, operands: Operands) -> tuple[jax.Array, ...]:
    """Binds the primitive. Returns hidden and the next norms."""
    leaves, tree = jax.tree.flatten(operands)
    return tuple(tail_p.bind(*leaves, tree=tree, options=options))


def _jvp(leaves, tangents, *, tree, options):
    """Returns the results and their tangents. JAX derives reverse mode from this rule."""
    operands, dots = tree.unflatten(leaves), tree.unflatten(tangents)
    # psum's own derivative and transpose, so that collectives and types are psum's, with check_vma
    # on and off. Reverse mode runs only the transpose.
    sum_dots = tuple(
        dot if isinstance(dot, ad.Zero) else jax.lax.psum(dot, options.axis_name)
        for dot in dots.partial_sums
    )
    if not operands.norm_scales:
        return fused_tail(options, operands), sum_dots
    # The derivative needs the reduced rows. The kernel returns only what comes after them, so it
    # reduces here, and XLA computes the rest.
    sums = [fused_tail(options, Operands((x,), ()))[0] for x in operands.partial_sums]
    sums = tuple(checkpoint_name(row, SAVED_SUMS) for row in sums)
    reduced = jax.tree.leaves(operands._replace(partial_sums=sums))
    dots = [*sum_dots, *tangents[len(sum_dots) :]]
    perturbed = {i: dot for i, dot in enumerate(dots) if not isinstance(dot, ad.Zero)}

    def of_perturbed(rows):
        leaves = [rows.get(i, leaf) for i, leaf in enumerate(reduced)]
        return _tail(options, tree.unflatten(leaves))

    # Reverse mode saves the reduced rows, which cost what the partial sums would, and no float32
    # intermediate of the norms.
    of_perturbed = jax.checkpoint(of_perturbed, prevent_cse=False)
    return jax.jvp(of_perturbed, ({i: reduced[i] for i in perturbed},), (perturbed,))


ad.primitive_jvps[tail_p] = _jvp


def _tail(options: Options, reduced: Operands) -> tuple[jax.Array, ...]:
    return tail(reduced, eps=options.eps, scale_offset=options.scale_offset)


def reference(options: Options, operands: Operands) -> tuple[jax.Array, ...]:
    """Computes fused_tail with psum."""
    return reference_tail(
        operands,
        axis_name=options.axis_name,
        eps=options.eps,
        scale_offset=options.scale_offset,
    )


def ffi_attributes(
    operands: Operands,
    algorithm: str,
    groups: np.ndarray,
    eps: float,
    scale_offset: float,
    max_ctas: int = 0,
) -> dict[str, Any]:
    """The attributes of both custom call targets, in the types that the handlers decode."""
    return {
        "algorithm": algorithm,
        "axis_size": np.int64(groups.shape[1]),
        "replica_groups": groups.astype(np.int64).ravel(),
        "eps": np.float32(eps),
        "scale_offset": np.float32(scale_offset),
        "max_ctas": np.int64(max_ctas),
        "branches": np.int64(len(operands.partial_sums)),
        "has_residual": operands.residual is not None,
        "has_layer_scalar": operands.layer_scalar is not None,
        "next_norms": np.int64(len(operands.next_norm_scales)),
    }


def _reference_of_leaves(*leaves, tree, options):
    return reference(options, tree.unflatten(leaves))


@tail_p.def_abstract_eval
def _abstract_eval(*avals, **params):
    # psum's own rules say what the results vary over, and how they are sharded.
    return jax.make_jaxpr(functools.partial(_reference_of_leaves, **params))(*avals).out_avals


def _lower_to_reference(ctx, *leaves, objections: tuple[Objection, ...], **params):
    _fall_back(params["options"].implementation, objections)
    function = functools.partial(_reference_of_leaves, **params)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _fall_back(implementation: str | None, objections: tuple[Objection, ...]) -> None:
    """Logs why a call runs as psum, or raises if it asked for an implementation."""
    if implementation:
        raise NotImplementedError(
            f'implementation="{implementation}" was asked for, but the kernel cannot run: '
            + "; ".join(objection.reason for objection in objections)
        )
    # Where psum is the right choice, nothing else has to change.
    log_fallback([o for o in objections if o.code in DELIBERATE] or objections)


_logged: set[FallbackCode] = set()


def log_fallback(objections: Iterable[Objection]) -> None:
    """Logs once per code why calls run as psum: at INFO where nobody expects the kernel."""
    for code, reason in objections:
        if code not in _logged:
            _logged.add(code)
            expected = code in DELIBERATE or code == FallbackCode.PLATFORM
            level = logging.INFO if expected else logging.WARNING
            message = "fused operations run as psum + tail: %s"
            logger.log(level, message, reason, extra={"code": code})


def _default_lowering(ctx, *leaves, **params):
    platforms = [name for name in ctx.module_context.platforms if name != "cuda"]
    objection = Objection(FallbackCode.PLATFORM, f"platform is {', '.join(platforms)}, not CUDA")
    return _lower_to_reference(ctx, *leaves, objections=(objection,), **params)


def _cuda_lowering(ctx, *leaves, tree, options):
    others = [name for name in ctx.module_context.platforms if name != "cuda"]
    if others:
        # XLA keeps a branch on the platform that has a collective in it, and then looks for the
        # handler on the other platforms too.
        objection = Objection(
            FallbackCode.SEVERAL_PLATFORMS,
            f"the program is exported for {', '.join(others)} too; export for CUDA alone",
        )
        return _lower_to_reference(
            ctx, *leaves, objections=(objection,), tree=tree, options=options
        )
    operands = tree.unflatten(ctx.avals_in)
    x = operands.partial_sums[0]
    context = ctx.module_context.axis_context
    # A client for another platform: lowering for CUDA on a machine without it.
    client = ctx.module_context.backend
    if client is not None and client.devices()[0].platform != "gpu":
        client = None
    decision = decide(
        x.shape,
        x.dtype,
        mesh=context.mesh,
        names=options.axis_name,
        client=client,
        branches=len(operands.partial_sums),
        manual_axes=context.manual_axes,
        implementation=options.implementation or "cuda",
    )
    if decision.algorithm is None:
        return _lower_to_reference(
            ctx, *leaves, objections=decision.objections, tree=tree, options=options
        )
    if not operands.norm_scales:
        function = functools.partial(_sum_by_norm, options)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)
    attributes = ffi_attributes(
        operands,
        decision.algorithm,
        replica_groups(context.mesh, options.axis_name),
        options.eps,
        options.scale_offset,
    )
    mesh_target, _ = TARGETS[options.implementation or "cuda"]
    return jax.ffi.ffi_lowering(mesh_target)(ctx, *leaves, **attributes)


# A norm that changes nothing. Next to this eps no mean of squares counts while |x| < 2**50, so rows
# are divided by 2**63. The scale multiplies by as much. Powers of two round nothing.
SUM_EPS, SUM_SCALE = 2.0**126, 2.0**63


def _sum_by_norm(options: Options, x: jax.Array) -> tuple[jax.Array, ...]:
    """Our kernel as an all-reduce alone, also for an implementation that rounds otherwise."""
    implementation = "cuda" if options.implementation == "cuda" else None
    options = Options(options.axis_name, SUM_EPS, SUM_SCALE, implementation)
    return fused_tail(options, Operands((x,), (jnp.zeros(x.shape[-1], jnp.float32),)))


mlir.register_lowering(tail_p, _default_lowering)
mlir.register_lowering(tail_p, _cuda_lowering, platform="cuda")


def _batch(leaves, dims, *, tree, options):
    """Folds the batch into the tokens: one collective for all of it."""
    size = next(a.shape[d] for a, d in zip(leaves, dims) if d is not None)
    operands, axes = tree.unflatten(leaves), tree.unflatten(dims)
    if jax.tree.leaves(axes._replace(partial_sums=(), residual=None)):
        reason = "a norm scale or layer_scalar has a vmapped axis"
        _fall_back(options.implementation, (Objection(FallbackCode.VMAPPED_SCALE, reason),))
        function = functools.partial(_reference_of_leaves, tree=tree, options=options)
        outs = jax.vmap(function, in_axes=tuple(dims))(*leaves)
        return outs, (0,) * len(outs)

    def fold(array, axis):
        if array is None:
            return None
        if axis is None:
            return jnp.broadcast_to(array, (size, *array.shape))
        return jnp.moveaxis(array, axis, 0)

    folded = operands._replace(
        partial_sums=tuple(map(fold, operands.partial_sums, axes.partial_sums)),
        residual=fold(operands.residual, axes.residual),
    )
    outs = tail_p.bind(*jax.tree.leaves(folded), tree=tree, options=options)
    return outs, (0,) * len(outs)


batching.primitive_batchers[tail_p] = _batch
