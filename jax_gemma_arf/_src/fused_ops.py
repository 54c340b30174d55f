"""The public operations: argument checks, then the primitive or the reference."""

from typing import Any, overload

import jax
import jax.numpy as jnp

from jax_gemma_arf._src import extension, lowering
from jax_gemma_arf._src.mesh import AxisName
from jax_gemma_arf._src.operands import (
    ONE_BRANCH,
    TWO_BRANCHES,
    Arguments,
    Implementation,
    Operands,
    as_operands,
    check_axis,
    check_number,
    check_operands,
    check_replication,
)


def fused_post_ff(
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """All-reduce, RMSNorm, residual add and layer scalar of a Gemma block, in one kernel launch.

    Computes, inside ``jax.shard_map``::

        (rmsnorm(psum(x, axis_name)) * (scale_offset + norm_scale) + residual) * layer_scalar

    Norm, then add: Gemma's order, not Llama's. On NVLinked CUDA devices this is one kernel launch;
    anywhere else it is psum and the same arithmetic, and the reason is logged once by the logger
    ``jax_gemma_arf``: at WARNING where a CUDA device lacks something for the kernel, else at INFO.

    Numerics. The kernel sums the ranks in float32 in rank order 0..N-1 and rounds once to x.dtype;
    psum adds in x.dtype. Everything after the sum is float32, with one rounding, to residual.dtype,
    at the end. All ranks of a call hold identical bits, run after run. With 2 ranks the sum equals
    psum's (but for the sign of a zero); only the order of the float32 mean differs, so bfloat16 and
    float16 outputs are equal or one unit in the last place apart, except where the normed row and
    the residual nearly cancel. The kernel's result for a token depends on neither the other tokens
    of the call nor their number.

    Differentiable in forward and reverse mode, any number of times; works under jit, scan,
    while_loop, remat and vmap, with check_vma on or off. Under differentiation the kernel only
    reduces, and XLA computes the norm and the rest, since a derivative reads the reduced row. The
    backward pass does not repeat the all-reduce; under jax.checkpoint, save
    ``jax_gemma_arf.SAVED_SUMS`` by name for that.

    Args:
      x: [..., D], bfloat16, float16 or float32: this rank's partial sums (varying, or unreduced,
        over axis_name).
      residual: [..., D], x's shape, replicated over axis_name.
      norm_scale: [D], replicated.
      layer_scalar: () or (1,), or None for 1 (the post-attention site; Gemma 4 E2B and E4B).
      axis_name: the manual mesh axis of tensor parallelism, or a tuple of them.
      eps: added to the mean of squares; positive.
      scale_offset: 0.0 for Gemma 4; 1.0 for Gemma 2 and 3, whose checkpoints hold w for 1 + w.
      implementation: "cuda" for the kernel or an error that says why it cannot run; "xla" for psum
        and the tail; None for the kernel where it can run and psum elsewhere, as
        :func:`jax_gemma_arf.fusion_support` tells. "flashinfer" for FlashInfer's all-reduce kernel
        with the same epilogue, in builds that have it (docs/design.md): its waits for a peer have
        no bound. It rounds where the kernel does, but takes a partial sum of -0.0 for 0.0.

    All operands are bfloat16, float16 or float32; float32 mixes with either of the others, but
    bfloat16 and float16 must not meet in one call.

    Returns:
      [..., D], residual.dtype, replicated over axis_name.

    Raises:
      ValueError, TypeError: at trace time, naming the argument, what must hold, and what came.
      NotImplementedError: when the call is lowered, if implementation is "cuda" or "flashinfer" and
        that kernel cannot run.

    Example:
      >>> @jax.shard_map(mesh=mesh, in_specs=(P(None, "tp"), P("tp"), P(), P()), out_specs=P())
      ... def post_ff(activations, w_down, residual, norm_scale):
      ...     partial_sums = activations @ w_down  # [4, 256], of this rank's 512 hidden units
      ...     return jga.fused_post_ff(partial_sums, residual, norm_scale, axis_name="tp")
      >>> ones = jnp.ones
      >>> post_ff(ones((4, 1024)), ones((1024, 256)), ones((4, 256)), 3 * ones(256))[:, 0]
      Array([4., 4., 4., 4.], dtype=float32)
    """
    operands = as_operands((x,), (norm_scale,), jnp.asarray(residual), layer_scalar)
    (hidden,) = _fused(operands, axis_name, eps, scale_offset, implementation)
    return hidden


def fused_sandwich[NormScales: (jax.Array, tuple[jax.Array, ...], list[jax.Array])](
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    next_norm_scale: NormScales,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, NormScales]:
    """:func:`fused_post_ff` and the norms that read its result, in one kernel launch.

    Computes, inside ``jax.shard_map``::

        hidden = fused_post_ff(x, residual, norm_scale, layer_scalar)
        normed = rmsnorm(hidden) * (scale_offset + next_norm_scale)

    The next norm reads hidden as rounded to its dtype, as a model does that hands it over; it is
    float32 inside, and rounded once. Otherwise all is as in fused_post_ff: numerics,
    transformations and errors.

    Args:
      x, residual, norm_scale, layer_scalar: as in fused_post_ff.
      next_norm_scale: [D], replicated: of the pre-norm of the block's next half, or of the next
        block's first. Or a tuple or list of 1 to 3 of them, where several norms read the row, as
        the router, the experts and the dense branch of a mixture-of-experts block do.
      axis_name, eps, scale_offset, implementation: as in fused_post_ff, for all of the norms.

    Returns:
      (hidden, normed), both [..., D], residual.dtype, replicated over axis_name; normed is a tuple
      if next_norm_scale is one.

    Example:
      >>> in_specs = (P(None, "tp"), P("tp"), P(), P(), P())
      >>> @jax.shard_map(mesh=mesh, in_specs=in_specs, out_specs=P())
      ... def post_attention(heads, w_out, residual, norm_scale, next_norm_scale):
      ...     return jga.fused_sandwich(
      ...         heads @ w_out,
      ...         residual,
      ...         norm_scale,
      ...         next_norm_scale=next_norm_scale,
      ...         axis_name="tp",
      ...     )
      >>> ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
      >>> hidden, normed = post_attention(
      ...     ones((4, 512)), ones((512, 256)), ones((4, 256)), 3 * ones(256), 2 * ones(256)
      ... )
      >>> hidden[:, 0], normed[:, 0]
      (Array([4, 4, 4, 4], dtype=bfloat16), Array([2, 2, 2, 2], dtype=bfloat16))
    """
    if next_norm_scale is None:
        raise TypeError("next_norm_scale must be given; without a next norm use fused_post_ff")
    operands = as_operands(
        (x,), (norm_scale,), jnp.asarray(residual), layer_scalar, next_norm_scale
    )
    hidden, *normed = _fused(operands, axis_name, eps, scale_offset, implementation)
    return hidden, _like(next_norm_scale, normed)


def fused_all_reduce_norm(
    x: jax.Array,
    norm_scale: jax.Array,
    *,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """All-reduce and RMSNorm in one kernel launch, with nothing added.

    Computes ``rmsnorm(psum(x, axis_name)) * (scale_offset + norm_scale)``, inside
    ``jax.shard_map``; otherwise as :func:`fused_post_ff`.

    Args:
      x, norm_scale: as in fused_post_ff.
      axis_name, eps, scale_offset, implementation: as in fused_post_ff.

    Returns:
      [..., D], x.dtype, replicated over axis_name.

    Example:
      >>> @jax.shard_map(mesh=mesh, in_specs=(P(None, "tp"), P("tp"), P()), out_specs=P())
      ... def project(activations, w, norm_scale):
      ...     return jga.fused_all_reduce_norm(activations @ w, norm_scale, axis_name="tp")
      >>> project(jnp.ones((4, 512)), jnp.ones((512, 256)), 3 * jnp.ones(256))[:, 0]
      Array([3., 3., 3., 3.], dtype=float32)
    """
    operands = as_operands((x,), (norm_scale,))
    (normed,) = _fused(operands, axis_name, eps, scale_offset, implementation)
    return normed


@overload
def fused_moe_tail(
    dense: jax.Array,
    experts: jax.Array,
    residual: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    dense_norm_scale: jax.Array,
    expert_norm_scale: jax.Array,
    norm_scale: jax.Array,
    next_norm_scale: None = None,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def fused_moe_tail[NormScales: (jax.Array, tuple[jax.Array, ...], list[jax.Array])](
    dense: jax.Array,
    experts: jax.Array,
    residual: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    dense_norm_scale: jax.Array,
    expert_norm_scale: jax.Array,
    norm_scale: jax.Array,
    next_norm_scale: NormScales,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, NormScales]: ...


def fused_moe_tail(
    dense: jax.Array,
    experts: jax.Array,
    residual: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    dense_norm_scale: jax.Array,
    expert_norm_scale: jax.Array,
    norm_scale: jax.Array,
    next_norm_scale: jax.Array | tuple[jax.Array, ...] | list[jax.Array] | None = None,
    axis_name: AxisName,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> Any:
    """Both all-reduces and the tail of a mixture-of-experts block, in one kernel launch.

    Computes, inside ``jax.shard_map``, with ``norm(row, w) = rmsnorm(row) * (scale_offset + w)``::

        branches = norm(psum(dense), dense_norm_scale) + norm(psum(experts), expert_norm_scale)
        hidden = (norm(branches, norm_scale) + residual) * layer_scalar
        normed = norm(hidden, next_norm_scale)                            # if it is given

    Both sums are rounded to their dtype, as the all-reduces would; from there to hidden everything
    is float32, with one rounding. The next norm reads the rounded hidden, as in
    :func:`fused_sandwich`. Otherwise all is as in :func:`fused_post_ff`.

    Args:
      dense: [..., D], this rank's partial sums of the dense branch.
      experts: [..., D], dense's dtype: this rank's partial sums of the routed experts' branch.
      residual: [..., D], replicated over axis_name.
      layer_scalar: () or (1,), or None for 1.
      dense_norm_scale: [D], replicated: of the dense branch's post-norm.
      expert_norm_scale: [D], replicated: of the experts' post-norm.
      norm_scale: [D], replicated: of the post-norm of the branches' sum.
      next_norm_scale: None, or as in fused_sandwich.
      axis_name, eps, scale_offset, implementation: as in fused_post_ff, for all of the norms;
        "flashinfer" is not there for this operation.

    Returns:
      hidden, or with next_norm_scale (hidden, normed) as in fused_sandwich: residual.dtype.

    Example:
      >>> @jax.shard_map(mesh=mesh, in_specs=(P("tp"), P("tp"), P(), P(), P(), P()), out_specs=P())
      ... def tail(dense, experts, residual, dense_scale, expert_scale, scale):
      ...     return jga.fused_moe_tail(
      ...         dense[0],
      ...         experts[0],
      ...         residual,
      ...         dense_norm_scale=dense_scale,
      ...         expert_norm_scale=expert_scale,
      ...         norm_scale=scale,
      ...         axis_name="tp",
      ...     )
      >>> ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
      >>> dense, experts = 2 * ones((2, 4, 256)), 3 * ones((2, 4, 256))  # partial sums of two ranks
      >>> tail(dense, experts, ones((4, 256)), ones(256), ones(256), 3 * ones(256))[:, 0]
      Array([4, 4, 4, 4], dtype=bfloat16)
    """
    operands = as_operands(
        (dense, experts),
        (dense_norm_scale, expert_norm_scale, norm_scale),
        jnp.asarray(residual),
        layer_scalar,
        next_norm_scale,
    )
    hidden, *normed = _fused(operands, axis_name, eps, scale_offset, implementation, TWO_BRANCHES)
    if next_norm_scale is None:
        return hidden
    return hidden, _like(next_norm_scale, normed)


def _fused(
    operands: Operands,
    axis_name: AxisName,
    eps: float,
    scale_offset: float,
    implementation: Implementation | None,
    arguments: Arguments = ONE_BRANCH,
) -> tuple[jax.Array, ...]:
    """Checks a call and binds it. Returns the finished row and the next norms."""
    eps, scale_offset = check_number("eps", eps), check_number("scale_offset", scale_offset)
    if eps <= 0:
        raise ValueError(f"eps must be positive in float32, got {eps}")
    if implementation not in ("cuda", "flashinfer", "xla", None):
        raise ValueError(
            f'implementation must be "cuda", "flashinfer", "xla" or None, got {implementation!r}'
        )
    if implementation == "flashinfer":
        _check_flashinfer(operands)
    check_operands(operands, arguments)
    names = check_axis(axis_name)
    check_replication(operands, arguments, names)
    options = lowering.Options(names, eps, scale_offset, implementation)
    # No tokens: nothing that a kernel could do.
    if implementation == "xla" or 0 in operands.partial_sums[0].shape:
        return lowering.reference(options, operands)
    return lowering.fused_tail(options, operands)


def _check_flashinfer(operands: Operands) -> None:
    """Refuses at trace time what no machine could run."""
    if len(operands.partial_sums) > 1:
        raise NotImplementedError(
            'implementation="flashinfer" is not there for fused_moe_tail: FlashInfer\'s kernels '
            'reduce one message, and the two branches are normed apart; use "cuda" or None'
        )
    if missing := extension.why_missing("flashinfer"):
        raise NotImplementedError(f'implementation="flashinfer": {missing}')


def _like(next_norm_scale, normed: list[jax.Array]) -> Any:
    """Returns a list or a tuple where next_norm_scale was one, else the one array."""
    if isinstance(next_norm_scale, list):
        return normed
    return tuple(normed) if isinstance(next_norm_scale, tuple) else normed[0]
