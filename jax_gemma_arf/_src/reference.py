"""The fused operations in plain JAX: definition, oracle and fallback."""

import functools
import operator

import jax
import jax.numpy as jnp

from jax_gemma_arf._src.operands import Operands


def reference_tail(
    operands: Operands, *, axis_name: str | tuple[str, ...], eps: float, scale_offset: float
) -> tuple[jax.Array, ...]:
    """``tail`` of the partial sums, reduced by psum in their own dtype.

    Args:
      operands: this rank's; all but the partial sums replicated over axis_name.
      axis_name: a mesh axis, inside jax.shard_map, or a tuple of them.
      eps: added to each mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.

    Returns:
      As ``tail``, replicated over axis_name. Nothing is checked.
    """
    summed = jax.lax.psum(operands.partial_sums, axis_name)
    return tail(operands._replace(partial_sums=summed), eps=eps, scale_offset=scale_offset)


def tail(operands: Operands, *, eps: float, scale_offset: float) -> tuple[jax.Array, ...]:
    """Everything after the all-reduce. With ``norm(row, w) = rmsnorm(row) * (scale_offset + w)``::

        row    = sum                              or  norm(sum_0, w_0) + norm(sum_1, w_1)
        hidden = (norm(row, w) + residual) * layer_scalar,    rounded once
        normed = norm(hidden, next_w)             for each next norm, of the rounded row

    All arithmetic is float32, and only the results are rounded. A model without the fused
    operation hands hidden to its next norm in hidden's dtype, and so does this.

    Args:
      operands: the reduced rows in place of the partial sums.
      eps: added to each mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3, whose checkpoints hold ``w`` for ``1 + w``.

    Returns:
      hidden and each normed, [..., D], all of ``operands.dtype``.
    """
    norm = functools.partial(_norm, eps=eps, scale_offset=scale_offset)
    rows = operands.partial_sums
    if not operands.norm_scales:
        return rows
    *branch_scales, scale = operands.norm_scales
    if branch_scales:
        rows = tuple(map(norm, rows, branch_scales))
    out = norm(functools.reduce(operator.add, rows), scale)
    if operands.residual is not None:
        out = out + operands.residual.astype(jnp.float32)
    if operands.layer_scalar is not None:
        out = out * operands.layer_scalar.astype(jnp.float32).reshape(())
    hidden = out.astype(operands.dtype)
    # On GPUs XLA drops a pair of conversions (xla_allow_excess_precision), but not this rounding.
    # All eight exponent bits, since it would flush subnormals of a smaller range to zero.
    row = jax.lax.reduce_precision(hidden.astype(jnp.float32), 8, jnp.finfo(hidden.dtype).nmant)
    return hidden, *(norm(row, w).astype(hidden.dtype) for w in operands.next_norm_scales)


def _norm(row: jax.Array, norm_scale: jax.Array, *, eps: float, scale_offset: float) -> jax.Array:
    """Zhang and Sennrich's RMSNorm (arXiv:1910.07467) over the last axis, scaled, in float32."""
    row = row.astype(jnp.float32)
    mean_square = jnp.mean(row * row, axis=-1, keepdims=True)
    scale = jnp.float32(scale_offset) + norm_scale.astype(jnp.float32)
    scale = jnp.expand_dims(scale, range(row.ndim - 1))  # users may forbid rank promotion
    return row * jax.lax.rsqrt(mean_square + jnp.float32(eps)) * scale


def rmsnorm(
    x: jax.Array, norm_scale: jax.Array, *, eps: float = 1e-6, scale_offset: float = 0.0
) -> jax.Array:
    """``rmsnorm(x) * (scale_offset + norm_scale)``, for the norms that follow no all-reduce.

    Args:
      x: [..., D].
      norm_scale: [D].
      eps: added to the mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.

    Returns:
      [..., D], x.dtype; float32 inside.
    """
    return _norm(x, norm_scale, eps=eps, scale_offset=scale_offset).astype(x.dtype)


def reference_post_ff(
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    axis_name: str | tuple[str, ...],
    eps: float = 1e-6,
    scale_offset: float = 0.0,
) -> jax.Array:
    """``post_ff_tail(psum(x, axis_name), ...)``: what fused_post_ff computes, in plain JAX.

    Args:
      x: [..., D], this rank's partial sums, added in x.dtype.
      residual: [..., D], replicated over axis_name.
      norm_scale: [D], replicated.
      layer_scalar: () or (1,), or None for 1.
      axis_name: a mesh axis, inside jax.shard_map, or a tuple of them.
      eps: added to the mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.

    Returns:
      [..., D], residual.dtype, replicated over axis_name. Nothing is checked.
    """
    return post_ff_tail(
        jax.lax.psum(x, axis_name),
        residual,
        norm_scale,
        layer_scalar,
        eps=eps,
        scale_offset=scale_offset,
    )


def post_ff_tail(
    summed: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
) -> jax.Array:
    """``(rmsnorm(summed) * (scale_offset + norm_scale) + residual) * layer_scalar``, as ``tail``.

    Args:
      summed: [..., D], the reduced row.
      residual: [..., D].
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      eps: added to the mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.

    Returns:
      [..., D], residual.dtype.
    """
    if layer_scalar is not None:
        layer_scalar = jnp.asarray(layer_scalar, jnp.float32)
    operands = Operands((summed,), (norm_scale,), residual, layer_scalar)
    return tail(operands, eps=eps, scale_offset=scale_offset)[0]
