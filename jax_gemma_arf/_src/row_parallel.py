"""Row-parallel projections with the fused tails behind them, for code outside ``jax.shard_map``.

Where the compiler places the collectives, no array holds partial sums. So the projection moves into
a shard_map, which is opened here, together with the tail that reduces its result.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal
from jax.sharding import AxisType, PartitionSpec

from jax_gemma_arf._src.fused_ops import fused_moe_tail, fused_post_ff, fused_sandwich
from jax_gemma_arf._src.mesh import AnyMesh, AxisName, axis_names, group_size
from jax_gemma_arf._src.operands import DTYPES, Implementation, as_array


class Projection(NamedTuple):
    """A projection whose result is summed over the ranks of tensor parallelism.

    Attributes:
      project: called as ``project(params, x)`` on the slices of one rank. Returns the partial sums
        of this rank, [..., D] as residual is there, bfloat16, float16 or float32. Linear in x.
      params: any tree of arrays: a weight, a LoRA pair, integers with their scales.
      x: ``[..., *features]``, residual's leading axes first, such as [B, T, F] or [B, T, N, H].
      bias: [D], replicated, added to the sum once; None for none.
      params_spec: PartitionSpecs of params, or of subtrees of it. Only axis_name counts: over other
        axes of the mesh (FSDP) parameters are gathered on entry, as for any matmul, and their
        gradients are sharded as the parameters are. None: as the types of params say on an Explicit
        mesh, elsewhere as the arrays are sharded, which no array tells under jit.
      x_spec: None for the first of the features sharded over axis_name, and the leading axes as
        residual's.
      check_linear: whether to raise if project is found not to be linear in x. False for functions
        that are meant to be so, such as matmuls that quantise x, or experts with their router.
    """

    project: Callable[[Any, Any], jax.Array]
    params: Any
    x: jax.Array
    bias: jax.Array | None = None
    params_spec: Any = None
    x_spec: PartitionSpec | None = None
    check_linear: bool = True


def row_parallel_post_ff(
    project: Callable[[Any, Any], jax.Array],
    params: Any,
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    axis_name: AxisName,
    mesh: AnyMesh | None = None,
    next_norm_scale: jax.Array | tuple[jax.Array, ...] | list[jax.Array] | None = None,
    bias: jax.Array | None = None,
    params_spec: Any = None,
    x_spec: PartitionSpec | None = None,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    check_linear: bool = True,
    check_vma: bool = True,
    implementation: Implementation | None = None,
) -> Any:
    """A projection, then :func:`fused_post_ff` or :func:`fused_sandwich`, outside of shard_map.

    Computes ``post_ff(psum(project(params, x)) + bias, residual, norm_scale, layer_scalar)``: opens
    a shard_map over all axes of the mesh (on a partly manual one XLA gathers the operands of a
    custom call over the others), calls project on the slices of each rank, and reduces in the fused
    tail. Works under jit, grad, scan over layers and remat. Nothing in project may reduce over
    axis_name.

    Args:
      project, params, x, bias, params_spec, x_spec, check_linear: as in :class:`Projection`.
      residual: [..., D], replicated over axis_name.
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      axis_name: the mesh axis (or axes) of tensor parallelism.
      mesh: the mesh; None for the current one, which ``jax.set_mesh`` sets.
      next_norm_scale: None, or as in fused_sandwich: [D], or a tuple or list of 1 to 3.
      token_spec: how the leading axes of x and residual are sharded over the other axes of the
        mesh, such as P("fsdp"). None: as residual's type says if the mesh is Explicit, else not at
        all: operands that are sharded otherwise are gathered, and every rank computes all tokens.
      check_vma: as in ``jax.shard_map``. False for a project that JAX cannot check, such as a
        Pallas kernel.
      eps, scale_offset, implementation: as in fused_post_ff.

    Returns:
      hidden [..., D], residual.dtype, sharded as token_spec says and replicated over axis_name.
      With next_norm_scale (hidden, normed), as fused_sandwich.

    Raises:
      ValueError, TypeError: at trace time, as fused_post_ff; also if project is not linear in x or
        returns another shape, if specs do not fit params or x, or if there is no mesh.
    """
    projection = Projection(project, params, x, bias, params_spec, x_spec, check_linear)
    return _row_parallel(
        (projection,),
        residual,
        {"norm_scale": norm_scale},
        layer_scalar,
        next_norm_scale,
        mesh=mesh,
        axis_name=axis_name,
        token_spec=token_spec,
        check_vma=check_vma,
        eps=eps,
        scale_offset=scale_offset,
        implementation=implementation,
    )


def row_parallel_moe_tail(
    dense: Projection,
    experts: Projection,
    residual: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    dense_norm_scale: jax.Array,
    expert_norm_scale: jax.Array,
    norm_scale: jax.Array,
    axis_name: AxisName,
    mesh: AnyMesh | None = None,
    next_norm_scale: jax.Array | tuple[jax.Array, ...] | list[jax.Array] | None = None,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    check_vma: bool = True,
    implementation: Implementation | None = None,
) -> Any:
    """Two projections, then :func:`fused_moe_tail`, outside of shard_map.

    Otherwise as :func:`row_parallel_post_ff`.

    Args:
      dense: the projection of the dense branch.
      experts: the projection of the experts, of the same dtype. The experts with their router are
        not linear: ``check_linear=False``, and ``x_spec`` for an x that is not sharded over
        axis_name.
      residual: [..., D], replicated over axis_name.
      layer_scalar, dense_norm_scale, expert_norm_scale, norm_scale: as in fused_moe_tail.
      axis_name, mesh, next_norm_scale, token_spec, check_vma: as in row_parallel_post_ff.
      eps, scale_offset, implementation: as in fused_post_ff.

    Returns:
      hidden, or (hidden, normed) with next_norm_scale, as row_parallel_post_ff returns them.

    Raises:
      ValueError, TypeError: as row_parallel_post_ff.
    """
    return _row_parallel(
        (dense, experts),
        residual,
        {
            "dense_norm_scale": dense_norm_scale,
            "expert_norm_scale": expert_norm_scale,
            "norm_scale": norm_scale,
        },
        layer_scalar,
        next_norm_scale,
        mesh=mesh,
        axis_name=axis_name,
        token_spec=token_spec,
        check_vma=check_vma,
        eps=eps,
        scale_offset=scale_offset,
        implementation=implementation,
    )


@overload
def down_proj_post_ff(
    activations: jax.Array,
    w_down: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    next_norm_scale: None = None,
    axis_name: AxisName,
    mesh: AnyMesh | None = None,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> jax.Array: ...


@overload
def down_proj_post_ff[NormScales: (jax.Array, tuple[jax.Array, ...], list[jax.Array])](
    activations: jax.Array,
    w_down: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    next_norm_scale: NormScales,
    axis_name: AxisName,
    mesh: AnyMesh | None = None,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, NormScales]: ...


def down_proj_post_ff(
    activations: jax.Array,
    w_down: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | float | None = None,
    *,
    next_norm_scale: jax.Array | tuple[jax.Array, ...] | list[jax.Array] | None = None,
    axis_name: AxisName,
    mesh: AnyMesh | None = None,
    token_spec: PartitionSpec | None = None,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> Any:
    """:func:`row_parallel_post_ff` with one matrix.

    Args:
      activations: [..., F], sharded over axis_name along F.
      w_down: [F, D], sharded over axis_name along F.
      residual, norm_scale, layer_scalar: as in row_parallel_post_ff.
      next_norm_scale, axis_name, mesh, token_spec: as in row_parallel_post_ff.
      eps, scale_offset, implementation: as in fused_post_ff.

    Returns:
      hidden, or (hidden, normed) with next_norm_scale, as row_parallel_post_ff returns them.

    Raises:
      ValueError, TypeError: at trace time, as row_parallel_post_ff.

    Example:
      >>> activations, w_down = jnp.ones((4, 1024)), jnp.ones((1024, 256))
      >>> residual, norm_scale = jnp.ones((4, 256)), 3 * jnp.ones(256)
      >>> jga.down_proj_post_ff(
      ...     activations, w_down, residual, norm_scale, mesh=mesh, axis_name="tp"
      ... )[:, 0]
      Array([4., 4., 4., 4.], dtype=float32)
    """
    activations, w_down = map(jnp.asarray, (activations, w_down))
    mesh = _check_mesh(mesh)
    names = axis_names(axis_name, mesh)
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
    features, size = activations.shape[-1], group_size(mesh, names)
    if features != w_down.shape[0] or features % size != 0:
        raise ValueError(
            "F, the last axis of activations and the first of w_down, must agree and be divisible "
            f"by the {size} ranks of {axis_name!r}, got {features} and {w_down.shape[0]}"
        )
    expected = (*activations.shape[:-1], w_down.shape[1])
    if jnp.shape(residual) != expected:
        raise ValueError(
            f"residual must have the shape {expected} of activations @ w_down, got "
            f"{jnp.shape(residual)}"
        )
    return row_parallel_post_ff(
        lambda w_down, activations: jnp.dot(activations, w_down),
        w_down,
        activations,
        residual,
        norm_scale,
        layer_scalar,
        next_norm_scale=next_norm_scale,
        axis_name=names,
        mesh=mesh,
        params_spec=PartitionSpec(names),
        token_spec=token_spec,
        eps=eps,
        scale_offset=scale_offset,
        check_linear=False,
        implementation=implementation,
    )


def _row_parallel(
    projections: tuple[Projection, ...],
    residual,
    norm_scales,
    layer_scalar,
    next_norm_scale,
    *,
    mesh,
    axis_name,
    token_spec,
    check_vma,
    **options,
):
    mesh = _check_mesh(mesh)
    names = axis_names(axis_name, mesh)
    residual = jnp.asarray(residual)
    tokens = _check_token_spec(token_spec, residual, mesh, names)
    branches = ("x",) if len(projections) == 1 else ("dense.x", "experts.x")
    projections = tuple(p._replace(x=jnp.asarray(p.x)) for p in projections)
    rows, replicated = PartitionSpec(*tokens, None), PartitionSpec()

    operands = {
        "params": [p.params for p in projections],
        "x": [p.x for p in projections],
        "bias": [p.bias for p in projections],
        "residual": residual,
        "norm_scales": norm_scales,
        "layer_scalar": None if layer_scalar is None else as_array(layer_scalar),
        "next_norm_scale": next_norm_scale,
    }
    specs = jax.tree.map(lambda _: replicated, operands) | {
        "params": [_check_params_spec(p, mesh, names) for p in projections],
        "x": [_check_x_spec(*named, tokens, mesh, names) for named in zip(branches, projections)],
        "residual": rows,
    }

    def local(operands):
        shape = operands["residual"].shape
        arrays = zip(projections, operands["params"], operands["x"], operands["bias"])
        sums = [_partial_sums(*array, shape, names) for array in arrays]
        following = {"next_norm_scale": operands["next_norm_scale"]}
        if len(sums) == 2:
            tail: Any = functools.partial(fused_moe_tail, **following)
        elif next_norm_scale is None:
            tail = fused_post_ff
        else:
            tail = functools.partial(fused_sandwich, **following)
        return tail(
            *sums,
            operands["residual"],
            layer_scalar=operands["layer_scalar"],
            **operands["norm_scales"],
            axis_name=names,
            **options,
        )

    if _is_explicit(mesh):  # where shard_map demands operands that are sharded as it is told
        operands = jax.tree.map(
            lambda array, spec: jax.reshard(array, jax.NamedSharding(mesh, spec)), operands, specs
        )
    call = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=rows, check_vma=check_vma)
    return call(operands)


def _partial_sums(projection, params, x, bias, shape, names) -> jax.Array:
    """Calls project on the slices of one rank, and checks what it returns."""
    try:
        sums = projection.project(params, x)
    except Exception as error:
        slices = ", ".join(
            f"params{jax.tree_util.keystr(path)} {jnp.shape(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        )
        error.add_note(
            f"project was called on the slices of one rank of {names}: {slices}, x {x.shape}. If "
            "they do not fit together, give params_spec and x_spec."
        )
        raise
    if not isinstance(sums, jax.Array) or sums.shape != shape or sums.dtype not in DTYPES:
        raise ValueError(
            f"project must return the partial sums of one rank, {shape} of bfloat16, float16 or "
            f"float32, got {jax.tree.map(jax.typeof, sums)}"
        )
    if projection.check_linear:
        _check_linear(projection.project, params, x, sums)
    if bias is not None:
        first = jax.lax.axis_index(names) == 0
        sums = sums + jnp.where(first, bias, jnp.zeros_like(bias)).astype(sums.dtype)
    return sums


def _check_linear(project, params, x, sums) -> None:
    """Raises if project shows not to be linear in x, as far as a trace tells."""

    def of_x(x):
        return project(params, x)

    why = None
    try:
        jax.eval_shape(jax.linear_transpose(of_x, x), sums)
    except Exception as error:
        why = f"JAX cannot transpose it ({(str(error) or repr(error)).splitlines()[0]})"
    if why is None:
        traced = jax.make_jaxpr(of_x)(x).jaxpr
        if eqn := next(_added_constants(traced, set(traced.invars)), None):
            why = f"it adds an array {eqn.outvars[0].aval.str_short()} that x has no part in"
    if why is not None:
        raise ValueError(
            f"project must be linear in x, so that the results of the ranks add up, but {why}; "
            "apply nonlinear functions before it, give a bias as bias=, or pass check_linear=False "
            "if the results of the ranks add up all the same"
        )


def _added_constants(jaxpr, from_x: set) -> Iterator[Any]:
    """Yields the sums of a term that depends on x, which are the variables in from_x, and one that
    does not."""
    for eqn in jaxpr.eqns:
        depends = [not isinstance(v, Literal) and v in from_x for v in eqn.invars]
        if not any(depends):
            continue
        from_x.update(eqn.outvars)
        if eqn.primitive.name in ("add", "sub", "add_any") and not all(depends):
            (term,) = (v for v, of_x in zip(eqn.invars, depends) if not of_x)
            if not (isinstance(term, Literal) and term.val == 0):
                yield eqn
        for param in eqn.params.values():  # of jit and the like
            inner = getattr(param, "jaxpr", param)
            if isinstance(inner, Jaxpr) and len(inner.invars) == len(depends):
                yield from _added_constants(
                    inner, {v for v, of_x in zip(inner.invars, depends) if of_x}
                )


def _check_mesh(mesh: AnyMesh | None) -> AnyMesh:
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise ValueError("mesh must be given, or set by jax.set_mesh, got neither")
    if AxisType.Manual in mesh.axis_types:
        raise ValueError(
            f"mesh must have no manual axes, got {mesh}; inside jax.shard_map call fused_post_ff"
        )
    return mesh


def _is_explicit(mesh: AnyMesh) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _check_token_spec(
    token_spec: PartitionSpec | None,
    residual: jax.Array,
    mesh: AnyMesh,
    names: tuple[str, ...],
) -> tuple[AxisName | None, ...]:
    """Returns token_spec, one entry for each leading axis of residual."""
    leading = residual.ndim - 1
    if _is_explicit(mesh):
        spec = jax.typeof(residual).sharding.spec
        if any(_axes(entry) & set(names) for entry in spec):
            raise ValueError(
                f"residual must be replicated over axis_name {names}, got one sharded as {spec}: "
                "every layer would gather it. Shard its leading axes over other axes of the mesh, "
                "or reshard it once, where the residual stream begins"
            )
        if token_spec is None:
            token_spec = PartitionSpec(*spec[:-1])
    token_spec = PartitionSpec() if token_spec is None else token_spec
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


def _check_x_spec(name, projection, tokens, mesh, names) -> PartitionSpec:
    """Returns how x is sharded."""
    x, spec = projection.x, projection.x_spec
    if spec is None:
        if x.ndim <= len(tokens):
            raise ValueError(
                f"{name} must have features behind residual's {len(tokens)} leading axes, got the "
                f"shape {x.shape}; or give x_spec"
            )
        spec = PartitionSpec(*tokens, names)
    return _check_spec(name, x, spec, mesh)


def _check_params_spec(projection, mesh, names) -> Any:
    """Returns how each of params is sharded over names, and over nothing else."""
    params, specs = projection.params, projection.params_spec
    if specs is None:
        specs = jax.tree_util.tree_map_with_path(
            functools.partial(_spec_of_array, explicit=_is_explicit(mesh)), params
        )
    else:
        try:
            specs = jax.tree.broadcast(
                specs, params, is_leaf=lambda spec: spec is None or isinstance(spec, PartitionSpec)
            )
        except ValueError as error:
            raise ValueError(f"params_spec must be a prefix of params: {error}") from None

    def check(path, param, spec):
        name = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(spec, PartitionSpec | None):
            raise TypeError(f"params_spec must hold PartitionSpecs, got {spec!r} for {name}")
        entries = [tuple(sorted(_axes(e) & set(names), key=names.index)) for e in spec or ()]
        return _check_spec(name, param, PartitionSpec(*(e or None for e in entries)), mesh)

    return jax.tree_util.tree_map_with_path(check, params, specs)


def _spec_of_array(path, array, *, explicit: bool) -> PartitionSpec:
    sharding = None
    if explicit:
        sharding = jax.typeof(array).sharding
    elif not isinstance(array, Tracer):
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, jax.NamedSharding):  # of an array on one device, or NumPy's
            return PartitionSpec()
    if sharding is None:
        raise ValueError(
            "params_spec must be given under jit on a mesh that is not Explicit, where no array "
            f"tells how it is sharded; got None, and params{jax.tree_util.keystr(path)} is traced"
        )
    return sharding.spec


def _check_spec(name: str, array: jax.Array, spec: PartitionSpec, mesh: AnyMesh) -> PartitionSpec:
    """Returns spec, which must divide the axes of the array."""
    shape = jnp.shape(array)
    shards = [_axes(entry) for entry in spec]
    known = set().union(*shards) <= set(mesh.axis_names)
    if (
        len(spec) > len(shape)
        or not known
        or any(
            length % math.prod(mesh.shape[axis] for axis in axes)
            for length, axes in zip(shape, shards)
        )
    ):
        raise ValueError(
            f"the axes of {name} must be divisible by the axes of the mesh {dict(mesh.shape)} that "
            f"shard them, got the shape {shape} sharded as {spec}"
        )
    return spec


def _axes(entry: AxisName | None) -> set[str]:
    """Returns the mesh axes in one entry of a PartitionSpec."""
    if entry is None:
        return set()
    return {entry} if isinstance(entry, str) else set(entry)
