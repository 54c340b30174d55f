"""The primitive behind fused_post_ff: its type, derivative and batching, and its lowering to one
FFI call on CUDA or to the reference anywhere else."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_gemma_arf import extension, support
from jax_gemma_arf.reference import reference_post_ff

logger = logging.getLogger("jax_gemma_arf")

MESH_TARGET = "jax_gemma_arf.post_ff"
LOOPBACK_TARGET = "jax_gemma_arf.loopback_post_ff"

# Operands: x, residual, norm_scale and, optionally, layer_scalar. Parameters: axis_name (a tuple),
# eps, scale_offset, implementation ("cuda" or None).
post_ff_p = Primitive("fused_post_ff")


def ffi_attributes(
    algorithm: str, groups: np.ndarray, eps: float, scale_offset: float, max_ctas: int = 0
) -> dict[str, Any]:
    """The attributes of both custom call targets, in the types that the handlers decode."""
    return {
        "algorithm": algorithm,
        "axis_size": np.int64(groups.shape[1]),
        "replica_groups": groups.astype(np.int64).ravel(),
        "eps": np.float32(eps),
        "scale_offset": np.float32(scale_offset),
        "max_ctas": np.int64(max_ctas),
    }


@post_ff_p.def_abstract_eval
def _abstract_eval(x, residual, *scales, axis_name, **_):
    # As psum: what was varying or unreduced over axis_name is replicated afterwards.
    varying = frozenset().union(*(aval.manual_axis_type.varying for aval in (x, residual, *scales)))
    return residual.update(
        weak_type=False,
        manual_axis_type=residual.manual_axis_type.update(varying=varying - set(axis_name)),
    )


def _reference(*operands, axis_name, eps, scale_offset, implementation=None):
    del implementation
    return reference_post_ff(*operands, axis_name=axis_name, eps=eps, scale_offset=scale_offset)


def _lower_to_reference(ctx, *operands, reason: str, level: int = logging.INFO, **params):
    if params["implementation"] == "cuda":
        raise NotImplementedError(
            f'implementation="cuda" was asked for, but the kernel cannot run: {reason}'
        )
    _log_fallback(reason, level)
    return mlir.lower_fun(functools.partial(_reference, **params), multiple_results=False)(
        ctx, *operands
    )


@functools.cache
def _log_fallback(reason: str, level: int) -> None:
    """Says once per reason that calls run as psum."""
    logger.log(level, "fused_post_ff runs as psum + tail: %s", reason)


def _default_lowering(ctx, *operands, **params):
    platforms = ", ".join(ctx.module_context.platforms)
    return _lower_to_reference(
        ctx, *operands, reason=f"platform is {platforms}, not CUDA", **params
    )


def _cuda_lowering(ctx, *operands, axis_name, eps, scale_offset, implementation):
    x = ctx.avals_in[0]
    context = ctx.module_context.axis_context
    # A client for another platform: lowering for CUDA on a machine without it.
    client = ctx.module_context.backend
    if client is not None and client.devices()[0].platform != "gpu":
        client = None
    decision = support.decide(
        x.shape,
        x.dtype,
        mesh=context.mesh,
        axis_name=axis_name,
        client=client,
        manual_axes=context.manual_axes,
        forced=implementation == "cuda",
    )
    if not decision.ok:
        # With something to reduce, the fallback may cost time that the caller does not expect.
        costs = support.axis_size(context.mesh, axis_name) > 1 and 0 not in x.shape
        return _lower_to_reference(
            ctx,
            *operands,
            reason=decision.reason,
            level=logging.WARNING if costs else logging.INFO,
            axis_name=axis_name,
            eps=eps,
            scale_offset=scale_offset,
            implementation=implementation,
        )
    assert decision.algorithm is not None
    extension.load()
    attributes = ffi_attributes(
        decision.algorithm, support.replica_groups(context.mesh, axis_name), eps, scale_offset
    )
    return jax.ffi.ffi_lowering(MESH_TARGET)(ctx, *operands, **attributes)


mlir.register_lowering(post_ff_p, _default_lowering)
mlir.register_lowering(post_ff_p, _cuda_lowering, platform="cuda")


def _batch(args, dims, **params):
    """Folds the batch into the tokens: one collective for all of it."""
    size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    if any(d is not None for d in dims[2:]):
        if params["implementation"] == "cuda":
            raise ValueError(
                'implementation="cuda" needs norm_scale and layer_scalar without a vmapped axis'
            )
        return jax.vmap(functools.partial(_reference, **params), in_axes=tuple(dims))(*args), 0
    x, residual = (
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[:2], dims[:2])
    )
    return post_ff_p.bind(x, residual, *args[2:], **params), 0


batching.primitive_batchers[post_ff_p] = _batch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def post_ff(params: tuple[tuple[str, Any], ...], operands: tuple[jax.Array, ...]) -> jax.Array:
    """Binds the primitive with a derivative. params: its parameters as sorted items."""
    return post_ff_p.bind(*operands, **dict(params))


def _forward(params, operands):
    return post_ff(params, operands), operands


def _backward(params, operands, cotangent):
    # The reference's own derivative, so that the collectives of the transpose and the types under
    # check_vma are those of psum.
    _, vjp = jax.vjp(functools.partial(_reference, **dict(params)), *operands)
    return (vjp(cotangent),)


post_ff.defvjp(_forward, _backward)
