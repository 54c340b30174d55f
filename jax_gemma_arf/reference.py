"""What the fused operations compute, in plain JAX: definition, oracle and fallback."""

import jax
import jax.numpy as jnp


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
    """``(rmsnorm(summed) * (scale_offset + norm_scale) + residual) * layer_scalar``.

    The RMSNorm is Zhang and Sennrich's (arXiv:1910.07467), over the last axis. All arithmetic is
    float32; the one rounding is to residual.dtype.

    Args:
      summed: [..., D], the reduced row.
      residual: [..., D].
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      eps: added to the mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3, whose checkpoints hold ``w`` for ``1 + w``.

    Returns:
      [..., D], residual.dtype.
    """
    row = summed.astype(jnp.float32)
    mean_square = jnp.mean(row * row, axis=-1, keepdims=True)
    normed = row * jax.lax.rsqrt(mean_square + jnp.float32(eps))
    scale = jnp.float32(scale_offset) + norm_scale.astype(jnp.float32)
    scale = jnp.expand_dims(scale, range(row.ndim - 1))  # users may forbid rank promotion
    out = normed * scale + residual.astype(jnp.float32)
    if layer_scalar is not None:
        out = out * jnp.asarray(layer_scalar, jnp.float32).reshape(())
    return out.astype(residual.dtype)
