"""The primitive behind fused_post_ff: its type, derivative and batching, and its lowering to one
FFI call on CUDA or to the reference anywhere else."""

import functools
import logging
import re
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


def _reference(*operands, axis_name, eps, scale_offset, implementation=None):
    del implementation
    return reference_post_ff(*operands, axis_name=axis_name, eps=eps, scale_offset=scale_offset)


@post_ff_p.def_abstract_eval
def _abstract_eval(*avals, **params):
    # psum's own rules say what the result varies over, and how it is sharded.
    (out,) = jax.make_jaxpr(functools.partial(_reference, **params))(*avals).out_avals
    return out


def _lower_to_reference(ctx, *operands, reason: str, level: int, **params):
    if params["implementation"] == "cuda":
        raise NotImplementedError(_refusal(reason))
    log_fallback(reason, level)
    return mlir.lower_fun(functools.partial(_reference, **params), multiple_results=False)(
        ctx, *operands
    )


def _refusal(reason: str) -> str:
    return f'implementation="cuda" was asked for, but the kernel cannot run: {reason}'


_logged: set[str] = set()


def log_fallback(reason: str, level: int = logging.WARNING) -> None:
    """Says once per reason, whatever the numbers in it, that calls run as psum."""
    kind = re.sub(r"\d+", "", reason)
    if kind not in _logged:
        _logged.add(kind)
        logger.log(level, "fused_post_ff runs as psum + tail: %s", reason)


def _default_lowering(ctx, *operands, **params):
    platforms = [name for name in ctx.module_context.platforms if name != "cuda"]
    reason = f"platform is {', '.join(platforms)}, not CUDA"
    return _lower_to_reference(ctx, *operands, reason=reason, level=logging.INFO, **params)


def _cuda_lowering(ctx, *operands, **params):
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
        names=params["axis_name"],
        client=client,
        manual_axes=context.manual_axes,
        forced=params["implementation"] == "cuda",
    )
    if decision.algorithm is None:
        level = logging.INFO if decision.deliberate else logging.WARNING
        return _lower_to_reference(ctx, *operands, reason=decision.reason, level=level, **params)
    extension.load()
    attributes = ffi_attributes(
        decision.algorithm,
        support.replica_groups(context.mesh, params["axis_name"]),
        params["eps"],
        params["scale_offset"],
    )
    return jax.ffi.ffi_lowering(MESH_TARGET)(ctx, *operands, **attributes)


mlir.register_lowering(post_ff_p, _default_lowering)
mlir.register_lowering(post_ff_p, _cuda_lowering, platform="cuda")


def _batch(args, dims, **params):
    """Folds the batch into the tokens: one collective for all of it."""
    size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    if any(d is not None for d in dims[2:]):
        reason = "norm_scale or layer_scalar has a vmapped axis"
        if params["implementation"] == "cuda":
            raise NotImplementedError(_refusal(reason))
        log_fallback(reason)
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
