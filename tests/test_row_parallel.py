"""Projections with their tails from outside shard_map, against the unsharded arithmetic."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.runners import make_mesh, place
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf._src.reference import tail

BATCH, TOKENS, WIDTH, HEADS, HEAD = 4, 3, 256, 4, 8
UNITS = HEADS * HEAD
OPTIONS: dict[str, Any] = {"eps": 0.1, "scale_offset": 1.0}


def matrix(params, x):
    return x @ params


def heads(params, x):
    return jnp.einsum("btnh,nhd->btd", x, params["w"])


def lora(params, x):
    return heads(params, x) + 0.5 * jnp.einsum("btnh,nhr,rd->btd", x, params["a"], params["b"])


def quantised(params, x):
    return (x @ params["int8"].astype(x.dtype)) * params["scale"].astype(x.dtype)


W, W_HEADS = ((UNITS, WIDTH), P("tp", "fsdp")), ((HEADS, HEAD, WIDTH), P("tp", None, "fsdp"))
LORA = {"w": W_HEADS, "a": ((HEADS, HEAD, 2), P("tp")), "b": ((2, WIDTH), P(None, "fsdp"))}
QUANTISED = {"int8": W, "scale": ((WIDTH,), P("fsdp"))}
# A function, its parameters with their specs, the shape of x's features.
PROJECTIONS = {
    "matrix": (matrix, W, (UNITS,)),
    "einsum": (heads, {"w": W_HEADS}, (HEADS, HEAD)),
    "lora": (lora, LORA, (HEADS, HEAD)),
    "quantised": (quantised, QUANTISED, (UNITS,)),
}


def is_pair(node):
    return isinstance(node, tuple)


def make(name):
    """The function of a projection, and arguments and their specs by name."""
    project, params, features = PROJECTIONS[name]
    rng = np.random.default_rng(0)

    def array(path, shape):
        if "int8" in jax.tree_util.keystr(path):
            return jnp.asarray(rng.integers(-9, 9, shape), jnp.int8)
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def of_shapes(path, pair):
        return array(path, pair[0])

    arrays = {
        "params": jax.tree_util.tree_map_with_path(of_shapes, params, is_leaf=is_pair),
        "x": array((), (BATCH, TOKENS, *features)),
        "residual": array((), (BATCH, TOKENS, WIDTH)),
        "norm_scale": array((), (WIDTH,)),
        "layer_scalar": jnp.float32(0.5),
        "bias": array((), (WIDTH,)),
        "next_norm_scale": array((), (WIDTH,)),
    }
    specs = jax.tree.map(lambda _: P(), arrays) | {
        "params": jax.tree.map(lambda pair: pair[1], params, is_leaf=is_pair),
        "x": P("fsdp", None, "tp"),
        "residual": P("fsdp"),
    }
    return project, arrays, specs


@functools.partial(jax.jit, static_argnums=0)
def unsharded(project, arrays):
    operands = Operands(
        (project(arrays["params"], arrays["x"]) + arrays["bias"],),
        (arrays["norm_scale"],),
        arrays["residual"],
        arrays["layer_scalar"],
        (arrays["next_norm_scale"],),
    )
    return tail(operands, **OPTIONS)


def fused(project, arrays, **options):
    arguments = [arrays[name] for name in ("params", "x", "residual", "norm_scale", "layer_scalar")]
    options |= {name: arrays[name] for name in ("bias", "next_norm_scale")} | OPTIONS
    return jga.row_parallel_post_ff(project, *arguments, axis_name="tp", **options)


def loss(outputs):
    return sum(jnp.sum(jnp.sin((1 + i) * out)) for i, out in enumerate(outputs))


def gradients(function, arrays):
    """Returns the gradients of all floating arrays."""
    leaves, tree = jax.tree.flatten(arrays)
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def of_floating(chosen):
        merged = leaves.copy()
        for i, leaf in zip(floating, chosen):
            merged[i] = leaf
        return loss(function(tree.unflatten(merged)))

    return jax.grad(of_floating)([leaves[i] for i in floating])


def assert_close(got, want, tolerance=1e-4):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def fsdp_tp(cpus, axis_type=AxisType.Auto):
    return make_mesh((2, 2), ("fsdp", "tp"), cpus[:4], axis_type)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_matches_unsharded(cpus, name, axis_type):
    """Outputs and all gradients, over FSDP and TP."""
    mesh = fsdp_tp(cpus, axis_type)
    project, arrays, specs = make(name)
    placed = place(mesh, arrays, specs)
    options = {"token_spec": P("fsdp"), "params_spec": specs["params"]}
    if axis_type == AxisType.Explicit:  # where the types say so
        options = {}
    call = functools.partial(fused, project, mesh=mesh, **options)
    outputs = jax.jit(call)(placed)
    assert outputs[0].sharding.spec[0] == "fsdp"
    assert_close(outputs, unsharded(project, arrays))
    found = jax.jit(functools.partial(gradients, call))(placed)
    want = jax.jit(functools.partial(gradients, functools.partial(unsharded, project)))(arrays)
    assert_close(found, want)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_current_mesh(cpus, axis_type):
    """The mesh defaults to the mesh of jax.set_mesh, and specs to the sharding of the arrays."""
    mesh = fsdp_tp(cpus, axis_type)
    project, arrays, specs = make("lora")
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, specs)
        assert_close(fused(project, placed), unsharded(project, arrays))


@pytest.mark.parametrize(
    "remat",
    [
        lambda layer: layer,
        jax.checkpoint,
        functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(jga.SAVED_SUMS)
        ),
    ],
    ids=["saved", "remat", "by name"],
)
def test_scan_over_layers(cpus, remat):
    mesh = fsdp_tp(cpus)
    project, arrays, specs = make("lora")
    layers = {"params": jax.tree.map(lambda w: jnp.stack([w, 0.9 * w]), arrays["params"])}
    options = {"token_spec": P("fsdp"), "params_spec": specs["params"], "mesh": mesh}

    def model(block, layers):
        def layer(residual, weights):
            hidden, normed = block(arrays | weights | {"residual": residual})
            return hidden, jnp.mean(normed)

        hidden, means = jax.lax.scan(remat(layer), arrays["residual"], layers)
        return hidden, means

    call = functools.partial(model, functools.partial(fused, project, **options))
    want = functools.partial(model, functools.partial(unsharded, project))
    found, expected = (jax.jit(functools.partial(gradients, f)) for f in (call, want))
    assert_close(jax.jit(call)(layers), jax.jit(want)(layers))
    assert_close(found(layers), expected(layers))


def test_no_more_gathers(cpus):
    """The compiler places as many collectives in the unmodified code, and none of activations
    but the reduction itself: forward and backward."""
    mesh = fsdp_tp(cpus)
    project, arrays, specs = make("matrix")
    placed = place(mesh, arrays, specs)
    call = functools.partial(
        fused, project, mesh=mesh, token_spec=P("fsdp"), params_spec=specs["params"]
    )
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)

    def found(function):
        step = jax.jit(jax.grad(lambda arrays: loss(function(arrays))), out_shardings=shardings)
        forward = jax.jit(function).lower(placed).compile()
        return [jga.audit(program) for program in (forward, step.lower(placed).compile())]

    rows = (BATCH // 2, TOKENS, WIDTH)
    for ours, theirs in zip(found(call), found(functools.partial(unsharded, project))):
        for kind in ("all-gather", "all-to-all", "collective-permute"):
            assert sum(c.kind == kind for c in ours) <= sum(c.kind == kind for c in theirs), ours
        reductions = [c for c in ours if rows in c.shapes]
        assert [c.kind for c in reductions] == ["all-reduce"], ours


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_down_proj_with_next_norms(cpus, axis_type):
    """On the current mesh; next norms are structured as their scales."""
    _, arrays, specs = make("matrix")
    arrays["bias"] = jnp.zeros(WIDTH)
    hidden, normed = unsharded(matrix, arrays)
    names = ("x", "params", "residual", "norm_scale", "layer_scalar")
    mesh = fsdp_tp(cpus, axis_type)
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, specs)
        call = jax.jit(
            functools.partial(
                jga.down_proj_post_ff, axis_name="tp", token_spec=P("fsdp"), **OPTIONS
            )
        )
        operands, scale = [placed[name] for name in names], placed["next_norm_scale"]
        for scales, want in ((scale, normed), ((scale,), (normed,)), ([scale] * 2, [normed] * 2)):
            got = call(*operands, next_norm_scale=scales)
            assert jax.tree.structure(got) == jax.tree.structure((hidden, want))
            assert_close(got, (hidden, want))
        assert_close(call(*operands), hidden)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (jnp.ones(WIDTH + 1), r"next_norm_scale must have the shape \(256,\).*got \(257,\)"),
        ((), "next_norm_scale must be an array .* of 1 to 3, got 0"),
    ],
    ids=["shape", "none"],
)
def test_down_proj_rejects_next_norms(cpus, scales, message):
    _, arrays, _ = make("matrix")
    operands = [arrays[name] for name in ("x", "params", "residual", "norm_scale")]
    with pytest.raises(ValueError, match=message):
        jga.down_proj_post_ff(*operands, next_norm_scale=scales, axis_name="tp", mesh=fsdp_tp(cpus))


def test_moe(cpus):
    """Two branches; the experts choose by x, so they are not linear, and see all of x."""
    mesh = fsdp_tp(cpus)
    _, arrays, specs = make("einsum")
    rng = np.random.default_rng(1)
    experts = {
        "router": jnp.asarray(rng.standard_normal((WIDTH, 3)), jnp.float32),
        "up": jnp.asarray(rng.standard_normal((3, WIDTH, UNITS)), jnp.float32),
        "down": jnp.asarray(rng.standard_normal((3, UNITS, WIDTH)), jnp.float32),
    }
    expert_specs = {"router": P(), "up": P("fsdp", None, "tp"), "down": P("fsdp", "tp")}
    scales = [arrays["norm_scale"] + i for i in range(3)]

    def route(params, x):
        weights = jax.nn.softmax(x @ params["router"])
        units = jnp.tanh(jnp.einsum("btd,edf->btef", x, params["up"]))
        return jnp.einsum("btef,efd,bte->btd", units, params["down"], weights)

    def call(params, experts, x, residual):
        return jga.row_parallel_moe_tail(
            jga.Projection(heads, params, x, params_spec=specs["params"]),
            jga.Projection(
                route,
                experts,
                residual,
                params_spec=expert_specs,
                x_spec=P("fsdp"),
                check_linear=False,
            ),
            residual,
            dense_norm_scale=scales[0],
            expert_norm_scale=scales[1],
            norm_scale=scales[2],
            next_norm_scale=(arrays["next_norm_scale"],),
            axis_name="tp",
            mesh=mesh,
            token_spec=P("fsdp"),
            **OPTIONS,
        )

    def want(params, experts, x, residual):
        operands = Operands(
            (heads(params, x), route(experts, residual)),
            tuple(scales),
            residual,
            None,
            (arrays["next_norm_scale"],),
        )
        hidden, normed = tail(operands, **OPTIONS)
        return hidden, (normed,)

    def total(function):
        return lambda *operands: loss(jax.tree.leaves(function(*operands)))

    operands = arrays["params"], experts, arrays["x"], arrays["residual"]
    assert_close(jax.jit(call)(*operands), jax.jit(want)(*operands))
    every = tuple(range(len(operands)))
    found = jax.jit(jax.grad(total(call), every))(*operands)
    assert_close(found, jax.jit(jax.grad(total(want), every))(*operands), 1e-3)


BAD = {
    "nonlinear": (lambda w, x: jnp.tanh(x) @ w, {}, "must be linear in x.*transpose"),
    "square": (lambda w, x: (x * x) @ w, {}, "must be linear in x.*transpose"),
    "bias inside": (
        lambda w, x: x @ w + jnp.ones(WIDTH),
        {},
        r"must be linear in x.*adds an array float32\[2,3,256\].*bias=",
    ),
    "bias in jit": (jax.jit(lambda w, x: x @ w - 1.0), {}, "must be linear in x.*adds an array"),
    "shape": (lambda w, x: (x @ w)[..., :8], {}, r"\(2, 3, 256\) .*got float32\[2,3,8\]"),
    "dtype": (lambda w, x: (x @ w).astype(jnp.int32), {}, "bfloat16, float16 or.*got int32"),
    "tree": (lambda w, x: (x @ w, x), {}, "must return the partial sums of one rank"),
    "reduced": (lambda w, x: jax.lax.psum(x @ w, "tp"), {}, "must hold partial sums"),
    "spec missing": (
        matrix,
        {"params_spec": None},
        "params_spec must be given under jit",
    ),
    "spec of a tree": (matrix, {"params_spec": {"w": P()}}, "must be a prefix of params"),
    "spec of another type": (matrix, {"params_spec": "tp"}, "must hold PartitionSpecs, got 'tp'"),
    "spec too long": (
        matrix,
        {"params_spec": P(None, None, "tp")},
        "axes of params must be div",
    ),
    "spec that does not divide": (
        matrix,
        {"axis_name": ("tp", "odd"), "token_spec": P(), "params_spec": P(None, ("tp", "odd"))},
        r"axes of params must be divisible .*'odd': 3.* got the shape \(32, 256\)",
    ),
    "axis": (matrix, {"axis_name": "model"}, "axis_name must name one or several different axes"),
    "x_spec": (matrix, {"x_spec": P("model")}, "axes of x must be divisible by the axes of the m"),
    "token_spec": (matrix, {"token_spec": P("tp")}, "token_spec must name axes of the mesh other"),
    "no mesh": (matrix, {"mesh": None}, "mesh must be given, or set by jax.set_mesh, got neither"),
}


@pytest.mark.parametrize(("project", "options", "message"), BAD.values(), ids=BAD)
def test_rejected(cpus, project, options, message):
    mesh = make_mesh((2, 1, 2), ("fsdp", "odd", "tp"), cpus[:4])
    if "odd" in options.get("axis_name", ()):
        mesh = make_mesh((1, 3, 2), ("fsdp", "odd", "tp"), cpus[:6])
    _, arrays, specs = make("matrix")
    options = {"mesh": mesh, "token_spec": P("fsdp"), "params_spec": specs["params"]} | options
    options = {"axis_name": "tp"} | options
    arguments = [arrays[name] for name in ("params", "x", "residual", "norm_scale")]
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(functools.partial(jga.row_parallel_post_ff, project, **options), *arguments)


def test_slices_that_do_not_fit(cpus):
    """The error of project, with the shapes of the slices and what to give."""
    _, arrays, _ = make("matrix")
    arguments = [arrays[name] for name in ("params", "x", "residual", "norm_scale")]
    options = {"mesh": fsdp_tp(cpus), "axis_name": "tp", "params_spec": P()}
    with pytest.raises(TypeError) as caught:
        jax.eval_shape(functools.partial(jga.row_parallel_post_ff, matrix, **options), *arguments)
    note = caught.value.__notes__[0]
    assert "params (32, 256), x (4, 3, 16)" in note
    assert "give params_spec and x_spec" in note


@pytest.mark.parametrize("spec", [P("fsdp", None, "tp"), P("tp")], ids=str)
def test_residual_sharded_over_the_axis(cpus, spec):
    """On an Explicit mesh the type tells, before every layer gathers the residual: hazard 41."""
    mesh = fsdp_tp(cpus, AxisType.Explicit)
    project, arrays, specs = make("matrix")
    placed = place(mesh, arrays, specs | {"residual": spec})
    with pytest.raises(ValueError, match=r"residual must be replicated over axis_name.*'tp'"):
        jax.jit(functools.partial(fused, project, mesh=mesh))(placed)


def test_audit(cpus):
    """Finds the gathers of a residual that is sharded over the axis, where no type tells."""
    mesh = fsdp_tp(cpus)
    project, arrays, specs = make("matrix")
    options = {"mesh": mesh, "token_spec": P("fsdp"), "params_spec": specs["params"]}
    call = jax.jit(functools.partial(fused, project, **options))
    rows = (BATCH // 2, TOKENS, WIDTH)
    for spec, kinds in ((P("fsdp"), ["all-reduce"]), (P("fsdp", None, "tp"), ["all-gather"] * 1)):
        placed = place(mesh, arrays, specs | {"residual": spec})
        found = jga.audit(call.lower(placed).compile(), elements=math.prod(rows))
        assert sorted(c.kind for c in found if rows in c.shapes) == sorted({"all-reduce", *kinds})
