"""The public operations: argument checks, then the primitive or the reference."""

import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jax_gemma_arf import lowering
from jax_gemma_arf.reference import reference_post_ff
from jax_gemma_arf.support import DTYPES, AxisName, axis_names, group_size

Implementation = Literal["cuda", "xla"]


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

    Norm, then add: Gemma's order, not Llama's. On NVLinked CUDA devices this is one launch of
    FlashInfer's all-reduce with a Gemma epilogue; anywhere else it is psum and the same arithmetic,
    and the reason is logged once by the logger ``jax_gemma_arf``: at WARNING where a CUDA device
    lacks something for the kernel, else at INFO.

    Numerics. The kernel sums the ranks in float32 in rank order 0..N-1 and rounds once to x.dtype;
    psum adds in x.dtype. Everything after the sum is float32, with one rounding, to residual.dtype,
    at the end. All ranks of a call hold identical bits, run after run. With 2 ranks the sum equals
    psum's (but for the sign of a zero); only the order of the float32 mean differs, so bfloat16 and
    float16 outputs are equal or one unit in the last place apart, except where the normed row and
    the residual nearly cancel. The kernel's result for a token depends on neither the other tokens
    of the call nor their number.

    Differentiable in reverse mode (the derivative is that of the psum implementation), and works
    under jit, scan, while_loop, remat and vmap, with check_vma on or off.

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
        and the tail; None for the kernel where it can run and is expected to be faster, and psum
        elsewhere, as :func:`jax_gemma_arf.fusion_support` tells.

    All operands are bfloat16, float16 or float32; float32 mixes with either of the others, but
    bfloat16 and float16 must not meet in one call.

    Returns:
      [..., D], residual.dtype, replicated over axis_name.

    Raises:
      ValueError, TypeError: at trace time, naming the argument, what must hold, and what came.
      NotImplementedError: when the call is lowered, if implementation is "cuda" and the kernel
        cannot run.
    """
    x, residual, norm_scale = jnp.asarray(x), jnp.asarray(residual), jnp.asarray(norm_scale)
    operands = (x, residual, norm_scale)
    if layer_scalar is not None:
        operands += (_as_array(layer_scalar),)
    eps, scale_offset = _check_number("eps", eps), _check_number("scale_offset", scale_offset)
    if eps <= 0:
        raise ValueError(f"eps must be positive in float32, got {eps}")
    if implementation not in ("cuda", "xla", None):
        raise ValueError(f'implementation must be "cuda", "xla" or None, got {implementation!r}')
    _check_operands(*operands)
    names = _check_axis(axis_name)
    _check_replication(operands, names)

    if implementation == "xla" or 0 in x.shape:  # no tokens: nothing that a kernel could do
        return reference_post_ff(*operands, axis_name=names, eps=eps, scale_offset=scale_offset)
    params = {
        "axis_name": names,
        "eps": eps,
        "scale_offset": scale_offset,
        "implementation": implementation,
    }
    return lowering.post_ff(tuple(sorted(params.items())), operands)


def down_proj_post_ff(
    activations: jax.Array,
    w_down: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    mesh: jax.sharding.Mesh,
    axis_name: AxisName,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Down-projection and :func:`fused_post_ff`, for code that is not inside ``jax.shard_map``.

    Opens a shard_map over all axes of the mesh (on a partly manual one XLA gathers the operands of
    a custom call over the others), multiplies this rank's slices, and reduces in the fused tail.

    Args:
      activations: [..., F], sharded over axis_name along F.
      w_down: [F, D], sharded over axis_name along F.
      residual: [..., D], replicated over axis_name.
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      mesh: the mesh.
      axis_name: its axis (or axes) of tensor parallelism.
      token_spec: how the leading axes of activations and residual are sharded over the other axes
        of the mesh, such as P("data"). None: as residual's type says if the mesh is Explicit, else
        not at all; operands that are sharded otherwise are gathered.
      eps, scale_offset, implementation: as in fused_post_ff.

    Returns:
      [..., D], residual.dtype, sharded as residual.

    Raises:
      ValueError, TypeError: at trace time, as fused_post_ff; also if the axis does not divide F.
    """
    activations, w_down, residual = map(jnp.asarray, (activations, w_down, residual))
    names = axis_names(axis_name, mesh)
    size = group_size(mesh, names)
    if activations.dtype != w_down.dtype or w_down.dtype not in DTYPES:
        raise TypeError(
            "activations and w_down must have one dtype, bfloat16, float16 or float32, got "
            f"{activations.dtype} and {w_down.dtype}"
        )
    if w_down.ndim != 2 or activations.ndim < 1:
        raise ValueError(
            f"activations must be [..., F] and w_down [F, D], got shapes {activations.shape} and "
            f"{w_down.shape}"
        )
    features = activations.shape[-1]
    if features != w_down.shape[0] or features % size != 0:
        raise ValueError(
            "F, the last axis of activations and the first of w_down, must agree and be divisible "
            f"by the {size} ranks of {axis_name!r}, got {features} and {w_down.shape[0]}"
        )
    expected = (*activations.shape[:-1], w_down.shape[1])
    if residual.shape != expected:
        raise ValueError(
            f"residual must have the shape {expected} of activations @ w_down, got {residual.shape}"
        )
    tokens = _check_token_spec(token_spec, residual, mesh, names)

    def local(activations, w_down, residual, norm_scale, *layer_scalar):
        partial_sums = jnp.dot(activations, w_down)
        return fused_post_ff(
            partial_sums,
            residual,
            norm_scale,
            *layer_scalar,
            axis_name=names,
            eps=eps,
            scale_offset=scale_offset,
            implementation=implementation,
        )

    operands = [activations, w_down, residual, norm_scale]
    in_specs = [
        PartitionSpec(*tokens, names),
        PartitionSpec(names, None),
        PartitionSpec(*tokens, None),
        PartitionSpec(),
    ]
    if layer_scalar is not None:
        operands.append(_as_array(layer_scalar))
        in_specs.append(PartitionSpec())
    if _is_explicit(mesh):  # where shard_map demands operands that are sharded as it is told
        shardings = [jax.NamedSharding(mesh, spec) for spec in in_specs]
        operands = [jax.reshard(a, sharding) for a, sharding in zip(operands, shardings)]
    return jax.shard_map(
        local, mesh=mesh, in_specs=tuple(in_specs), out_specs=PartitionSpec(*tokens, None)
    )(*operands)


def _is_explicit(mesh: jax.sharding.Mesh) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _check_token_spec(
    token_spec: PartitionSpec | None,
    residual: jax.Array,
    mesh: jax.sharding.Mesh,
    names: tuple[str, ...],
) -> tuple[AxisName | None, ...]:
    """token_spec, one entry for each leading axis of residual."""
    leading = residual.ndim - 1
    if token_spec is None:
        token_spec = PartitionSpec()
        if _is_explicit(mesh):
            spec = jax.typeof(residual).sharding.spec
            token_spec = PartitionSpec(*(None if _axes(e) & set(names) else e for e in spec[:-1]))
    if len(token_spec) > leading:
        raise ValueError(
            f"token_spec must have at most {leading} entries for residual's leading axes, "
            f"got {token_spec}"
        )
    allowed = set(mesh.axis_names) - set(names)
    for length, entry in zip(residual.shape, token_spec):
        shards = math.prod(mesh.shape[name] for name in _axes(entry) & allowed)
        if not _axes(entry) <= allowed or length % shards != 0:
            raise ValueError(
                f"token_spec must name axes of the mesh other than {names}, {sorted(allowed)}, "
                f"that divide residual's leading axes {residual.shape[:-1]}, got {token_spec}"
            )
    return (*token_spec, *(None,) * (leading - len(token_spec)))


def _axes(entry: AxisName | None) -> set[str]:
    """The mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return set()
    return {entry} if isinstance(entry, str) else set(entry)


def _as_array(layer_scalar: jax.Array | float) -> jax.Array:
    """A Python number becomes float32, also where JAX's default is float64."""
    return jnp.asarray(layer_scalar, jnp.float32 if isinstance(layer_scalar, int | float) else None)


def _check_number(name: str, value: float) -> float:
    """value as the float32 that the arithmetic will see."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a static number, got {type(value).__name__}")
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return number


def _check_operands(x, residual, norm_scale, layer_scalar=None) -> None:
    """Shapes and dtypes. No operand is ever converted silently, nor read as another dtype."""
    if x.ndim == 0:
        raise ValueError("x must be [..., D], got the shape ()")
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(f"x must have D > 0 elements a token, got the shape {x.shape}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {x.shape}, got {residual.shape}")
    if norm_scale.shape != (hidden,):
        raise ValueError(
            f"norm_scale must have the shape ({hidden},) for x of shape {x.shape}, "
            f"got {norm_scale.shape}"
        )
    named = {"x": x, "residual": residual, "norm_scale": norm_scale}
    if layer_scalar is not None:
        if layer_scalar.shape not in ((), (1,)):
            raise ValueError(
                f"layer_scalar must have the shape () or (1,), got {layer_scalar.shape}"
            )
        named["layer_scalar"] = layer_scalar
    for name, operand in named.items():
        if operand.dtype not in DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {operand.dtype}")
    if {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)} <= {a.dtype for a in named.values()}:
        dtypes = ", ".join(f"{name} {operand.dtype}" for name, operand in named.items())
        raise TypeError(f"bfloat16 and float16 must not be mixed in one call, got {dtypes}")


def _check_axis(axis_name: AxisName) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    manual = [name for name, kind in kinds.items() if kind == AxisType.Manual]
    try:
        names = axis_names(axis_name, mesh)
    except ValueError as error:
        raise ValueError(f"{error}; call inside jax.shard_map over that axis") from None
    if not set(names) <= set(manual):
        raise ValueError(
            f"axis_name must name manual axes, which are {manual} here, got {axis_name!r}; call "
            "inside jax.shard_map over that axis"
        )
    return names


def _check_replication(operands: tuple[jax.Array, ...], names: tuple[str, ...]) -> None:
    """x must be partial over the axes and the rest replicated, as far as check_vma lets us see."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name in names if mesh.shape[name] > 1}  # types leave out axes of size 1
    # Only under check_vma does a type say what varies; the rank's own index shows whether it is on.
    index = jax.eval_shape(lambda: jax.lax.axis_index(names)).manual_axis_type
    if index is None or not axes <= index.varying:
        return
    x, *others = (jax.typeof(operand).manual_axis_type for operand in operands)
    for name, kind in zip(("residual", "norm_scale", "layer_scalar"), others):
        if over := (kind.varying | kind.unreduced | kind.reduced) & axes:
            raise ValueError(
                f"{name} must be replicated over axis_name, got one that varies over or is typed "
                f"unreduced or reduced over {sorted(over)}; reduce or gather it first"
            )
    if not axes <= x.varying and not axes <= x.unreduced:
        raise ValueError(
            f"x must hold partial sums, varying or unreduced over all of {sorted(axes)}, got one "
            f"varying over {sorted(x.varying & axes)} and unreduced over "
            f"{sorted(x.unreduced & axes)}: it is reduced already, or lacks jax.lax.pcast"
        )
    if other := x.unreduced - set(names):
        raise ValueError(
            f"x must be unreduced over axis_name alone, got one unreduced over {sorted(other)} too"
        )
