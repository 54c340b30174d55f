"""All ranks of a tensor-parallel group on one GPU, for tests and benchmarks without a second one.

The ranks are streams of one device inside one FFI call, forked and joined by events. Everything but
the addresses of the peers is what a real mesh runs: workspace, handler, launch and kernels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_gemma_arf import extension, lowering
from jax_gemma_arf.support import AXIS_SIZES, choose_algorithm


def loopback_post_ff(
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    algorithm: str | None = None,
    max_ctas: int = 0,
) -> jax.Array:
    """The kernel of :func:`jax_gemma_arf.fused_post_ff`, all ranks on one CUDA device.

    Args:
      x: [N, ..., D], the partial sums of N = 2, 4 or 8 ranks.
      residual: [..., D].
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      eps: added to the mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.
      algorithm: "one_shot", "two_shot", or None for the rule of support.choose_algorithm.
      max_ctas: most thread blocks a rank may launch, from 8; 0 for all that fit.

    Returns:
      [N, ..., D], residual.dtype: what each rank computed.

    Raises:
      ValueError: if N is not 2, 4 or 8, or the trailing shapes of x and residual differ.
      NotImplementedError: if the extension was not built.
    """
    if extension.load() is None:
        raise NotImplementedError(f"loopback needs the extension: {extension.why_missing()}")
    if x.ndim < 2 or x.shape[0] not in AXIS_SIZES or x.shape[1:] != residual.shape:
        raise ValueError(
            f"x must be [N, *residual.shape] with N = 2, 4 or 8, got {x.shape} for a residual of "
            f"{residual.shape}"
        )
    ranks = x.shape[0]
    if algorithm is None:
        algorithm = choose_algorithm(ranks, math.prod(residual.shape) * x.dtype.itemsize)
    operands = (x, residual, norm_scale)
    if layer_scalar is not None:
        operands += (jnp.asarray(layer_scalar),)
    attributes = lowering.ffi_attributes(
        algorithm, np.arange(ranks)[None], eps, scale_offset, max_ctas
    )
    result = jax.ShapeDtypeStruct(x.shape, residual.dtype)
    return jax.ffi.ffi_call(lowering.LOOPBACK_TARGET, result)(*operands, **attributes)
