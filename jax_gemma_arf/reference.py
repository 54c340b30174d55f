"""What the fused operations compute, in plain JAX: definition, oracle and fallback."""

import jax
import jax.numpy as jnp


def reference_post_ff(
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...],
    eps: float = 1e-6,
    scale_offset: float = 0.0,
) -> jax.Array:
    """psum in x.dtype, then the float32 tail. Arguments as in :func:`jax_gemma_arf.fused_post_ff`,
    without its checks."""
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
    layer_scalar: jax.Array | None = None,
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
        out = out * layer_scalar.astype(jnp.float32).reshape(())
    return out.astype(residual.dtype)
