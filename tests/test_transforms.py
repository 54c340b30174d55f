"""The fused operations under JAX's transformations and on every kind of mesh, against the float64
oracle or the unsharded computation. Everything runs on a CPU mesh and, where there are GPUs, on
theirs."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.cases import BF16, F32, OPS, Case, assert_matches, compose, make_inputs
from helpers.runners import call_op, in_specs, make_mesh, mesh_call, one_rank, place
from jax_gemma_arf._src import lowering
from jax_gemma_arf._src.operands import TWO_BRANCHES
from jax_gemma_arf._src.reference import post_ff_tail

NEXT_NORMS = {"sandwich": 1, "moe_tail": 2}
CASES = {op: Case((8,), 640, F32, op=op, next_norms=NEXT_NORMS.get(op, 0)) for op in OPS}

axis_types = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@pytest.fixture(params=["cpu", "multi_gpu"])
def devices(request, cpus, require_gpus):
    """8 virtual CPUs, or 2, 4 or 8 GPUs."""
    if request.param == "cpu":
        return cpus
    require_gpus(2)
    found = jax.devices("cuda")
    return found[: 2 ** int(np.log2(min(len(found), 8)))]


@pytest.fixture(params=OPS)
def case(request):
    return CASES[request.param]


def tp_mesh(devices, axis_type=AxisType.Auto):
    return make_mesh((len(devices),), ("tp",), devices, axis_type)


def on_gpus(mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu"


def kernel_on_gpus(mesh) -> str | None:
    """On GPUs the kernel or an error, so that no fallback passes unnoticed."""
    return "cuda" if on_gpus(mesh) else None


def tp_call(case, mesh, **options):
    """The case's operation: Inputs with all ranks' sums -> hidden and the next norms."""
    options.setdefault("implementation", kernel_on_gpus(mesh))
    return mesh_call(case, mesh, **options)


def check(case, mesh, inputs, outputs) -> None:
    assert_matches(case, inputs, map(np.asarray, outputs), exact_sum=on_gpus(mesh))


def norm(case, row, norm_scale):
    inverse_rms = jax.lax.rsqrt(jnp.mean(row * row, axis=-1, keepdims=True) + case.eps)
    return row * inverse_rms * (case.scale_offset + norm_scale)


def unsharded(case, inputs):
    """hidden and the next norms on one device, float32 throughout."""
    hidden = compose(case, inputs, [x.sum(0) for x in inputs.partial_sums], norm)
    return hidden, *(norm(case, hidden, scale) for scale in inputs.next_norm_scales)


def assert_close(got, want, tolerance=1e-4) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@axis_types
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_call(devices, case, axis_type, check_vma, jit):
    mesh = tp_mesh(devices, axis_type)
    inputs = make_inputs(case, len(devices))
    call = tp_call(case, mesh, check_vma=check_vma)
    outputs = (jax.jit(call) if jit else call)(place(mesh, inputs, in_specs(case)))
    check(case, mesh, inputs, outputs)


@axis_types
@pytest.mark.parametrize("order", [("data", "tp"), ("tp", "data")], ids="x".join)
def test_2d_mesh(devices, case, order, axis_type):
    """Hazards 7, 8 and 25: each data shard is reduced over its own tp group and over no other."""
    if len(devices) < 4:
        pytest.skip(f"needs 4 GPUs, found {len(devices)}")
    tp = len(devices) // 2
    sizes = {"data": 2, "tp": tp}
    mesh = make_mesh(tuple(sizes[name] for name in order), order, devices, axis_type)
    inputs = make_inputs(case, tp)
    specs = in_specs(case, P("tp", "data"), P("data"))
    call = tp_call(case, mesh, specs=specs, out_specs=P("data"))
    check(case, mesh, inputs, jax.jit(call)(place(mesh, inputs, specs)))


def test_several_axes(devices, case):
    """axis_name may be a tuple: the group is their product."""
    if len(devices) < 4:
        pytest.skip(f"needs 4 GPUs, found {len(devices)}")
    mesh = make_mesh((2, len(devices) // 2), ("a", "b"), devices)
    inputs = make_inputs(case, len(devices))
    specs = in_specs(case, P(("a", "b")))
    call = tp_call(case, mesh, specs=specs, axis_name=("a", "b"))
    check(case, mesh, inputs, jax.jit(call)(place(mesh, inputs, specs)))


def test_unreduced_operand(cpus):
    """x may be typed unreduced over the axis, as a matmul's out_sharding can leave it."""
    mesh = tp_mesh(cpus[:2], AxisType.Explicit)
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((4, 32), np.float32)
    w_down = rng.standard_normal((32, 640), np.float32)
    residual = rng.standard_normal((4, 640), np.float32)
    norm_scale = np.ones(640, np.float32)

    @jax.jit
    def call(activations, w_down, residual, norm_scale):
        x = jnp.einsum(
            "tf,fd->td",
            activations,
            w_down,
            out_sharding=jax.NamedSharding(mesh, P(None, None, unreduced=frozenset({"tp"}))),
        )
        return jax.shard_map(
            functools.partial(jga.fused_post_ff, axis_name="tp"),
            mesh=mesh,
            in_specs=(P(unreduced=frozenset({"tp"})), P(), P()),
            out_specs=P(),
        )(x, residual, norm_scale)

    placed = place(
        mesh, (activations, w_down, residual, norm_scale), (P(None, "tp"), P("tp"), P(), P())
    )
    expected = post_ff_tail(*map(jnp.asarray, (activations @ w_down, residual, norm_scale)))
    np.testing.assert_allclose(np.asarray(call(*placed)), expected, rtol=2e-5, atol=2e-5)


@axis_types
@pytest.mark.parametrize("check_vma", [True, False])
def test_grad(devices, case, axis_type, check_vma):
    """All gradients, through all outputs, against the unsharded computation; remat must not change
    them."""
    case = dataclasses.replace(case, eps=0.1, scale_offset=1.0)
    mesh = tp_mesh(devices, axis_type)
    inputs = make_inputs(case, len(devices))
    call = tp_call(case, mesh, check_vma=check_vma)

    def loss(function, inputs):
        return sum(jnp.sum(jnp.sin((1 + i) * out)) for i, out in enumerate(function(inputs)))

    gradients = jax.jit(jax.grad(loss, 1), static_argnums=0)
    placed = place(mesh, inputs, in_specs(case))
    want = jax.grad(loss, 1)(functools.partial(unsharded, case), jax.tree.map(jnp.asarray, inputs))
    assert_close(gradients(call, placed), want)
    assert_close(gradients(jax.checkpoint(call), placed), want)


def test_what_a_derivative_saves(mesh, case):
    """The reduced rows and the other operands, and no float32 intermediate of the norms."""
    case = dataclasses.replace(case, dtype=BF16)
    inputs = jax.tree.map(jnp.asarray, make_inputs(case, 2))
    _, backward = jax.vjp(tp_call(case, mesh), inputs)
    rows = inputs._replace(partial_sums=[x[0] for x in inputs.partial_sums])
    assert sum(a.nbytes for a in jax.tree.leaves(backward)) == sum(
        a.nbytes for a in jax.tree.leaves(rows)
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_forward_mode(devices, case, check_vma):
    """Derivatives along a direction, through all outputs; then along several at once."""
    case = dataclasses.replace(case, eps=0.1, scale_offset=1.0)
    mesh = tp_mesh(devices)
    inputs = make_inputs(case, len(devices))
    directions = make_inputs(dataclasses.replace(case, seed=1), len(devices))
    call, specs = tp_call(case, mesh, check_vma=check_vma), in_specs(case)
    placed = place(mesh, inputs, specs), place(mesh, directions, specs)

    def along(call, inputs, direction):
        return jax.jvp(call, (inputs,), (direction,))[1]

    def along_scaled(call, inputs, direction):
        def scaled(factor):
            return along(call, inputs, jax.tree.map(lambda a: factor * a, direction))

        return jax.vmap(scaled)(jnp.arange(1.0, 3.0))

    arrays = jax.tree.map(jnp.asarray, (inputs, directions))
    for derivative in (along, along_scaled):
        want = derivative(functools.partial(unsharded, case), *arrays)
        assert_close(jax.jit(derivative, static_argnums=0)(call, *placed), want)


def test_second_derivative(devices, case):
    """Forward over reverse, along all operands."""
    case = dataclasses.replace(case, eps=0.1, scale_offset=1.0)
    mesh = tp_mesh(devices)
    inputs = make_inputs(case, len(devices))
    call = tp_call(case, mesh)

    def product(call, inputs):
        def gradient(inputs):
            return jax.grad(lambda inputs: sum(jnp.sum(out**2) for out in call(inputs)))(inputs)

        return jax.jvp(gradient, (inputs,), (inputs,))[1]

    want = product(functools.partial(unsharded, case), jax.tree.map(jnp.asarray, inputs))
    got = jax.jit(product, static_argnums=0)(call, place(mesh, inputs, in_specs(case)))
    assert_close(got, want, 1e-3)


@pytest.mark.parametrize("rows", [P("data"), P()], ids=["sharded", "replicated"])
def test_types(cpus, case, rows):
    """Results vary over the right axes; gradients of operands that do not vary are summed."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4])
    inputs = make_inputs(case, 2)
    if case.has_residual and rows == P():
        inputs = inputs._replace(residual=inputs.residual[:4])

    def local(inputs):
        def loss(others):
            outputs = call_op(case, one_rank(inputs)._replace(**others), axis_name="tp")
            for out in outputs:
                assert jax.typeof(out).manual_axis_type.varying == {"data"}
                assert not jax.typeof(out).weak_type
            return jax.lax.psum(sum(jnp.sum(out * out) for out in outputs), "data")

        return jax.grad(loss)(without_sums(inputs))

    def without_sums(inputs):
        return {name: a for name, a in inputs._asdict().items() if name != "partial_sums"}

    def unsharded_loss(others):
        full = others["residual"]
        if case.has_residual and rows == P():
            full = jnp.concatenate([full, full])
        outputs = unsharded(case, inputs._replace(**others | {"residual": full}))
        return sum(jnp.sum(out * out) for out in outputs)

    specs = in_specs(case, P("tp", "data"), rows)
    call = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=without_sums(specs))
    inputs = jax.tree.map(jnp.asarray, inputs)
    want = jax.grad(unsharded_loss)(without_sums(inputs))
    assert_close(jax.jit(call)(inputs), want)


@pytest.mark.parametrize("scalar", [0.5, 2, np.int64(2), np.float64(0.5)], ids=repr)
def test_number_under_x64(mesh, scalar):
    case = CASES["post_ff"]
    inputs = make_inputs(case, 2)
    specs = in_specs(dataclasses.replace(case, layer_scalar=None))

    def local(inputs):
        return call_op(case, one_rank(inputs._replace(layer_scalar=scalar)), axis_name="tp")

    call = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())
    with jax.enable_x64(True):
        outputs = jax.jit(call)(inputs._replace(layer_scalar=None))
    inputs = inputs._replace(layer_scalar=np.float32(scalar).reshape(()))
    assert_matches(case, inputs, map(np.asarray, outputs), exact_sum=True)


@pytest.mark.parametrize("op", ["post_ff", "sandwich", "moe_tail"])
def test_scan_and_while(devices, op):
    """A decode loop: each step's residual is the last step's hidden."""
    case = CASES[op]
    mesh = tp_mesh(devices)
    inputs = make_inputs(case, len(devices))
    steps = 5

    def one_step(inputs):
        options = {"axis_name": "tp", "implementation": kernel_on_gpus(mesh)}
        return inputs._replace(residual=call_op(case, inputs, **options)[0])

    def scanned(inputs):
        def step(state, _):
            return one_step(state), None

        return jax.lax.scan(step, one_rank(inputs), length=steps)[0].residual

    def looped(inputs):
        def step(state):
            return state[0] + 1, one_step(state[1])

        init = (0, one_rank(inputs))
        return jax.lax.while_loop(lambda state: state[0] < steps, step, init)[1].residual

    want = jax.tree.map(jnp.asarray, inputs)
    for _ in range(steps):
        want = want._replace(residual=unsharded(case, want)[0])
    for body in (scanned, looped):
        call = jax.shard_map(body, mesh=mesh, in_specs=(in_specs(case),), out_specs=P())
        assert_close(jax.jit(call)(place(mesh, inputs, in_specs(case))), want.residual)


VMAPPED = [
    (op, fields)
    for op, case in CASES.items()
    for fields in (
        ("partial_sums",),
        ("residual",),
        ("partial_sums", "residual"),
        ("norm_scales",),
        ("layer_scalar",),
        ("next_norm_scales",),
    )
    if all(getattr(in_specs(case), field) for field in fields)
]


@pytest.mark.parametrize(("op", "batched"), VMAPPED, ids=str)
def test_vmap(devices, op, batched):
    """vmap inside the shard_map, over any operand, the batch axis last."""
    case = CASES[op]
    mesh = tp_mesh(devices)
    inputs = make_inputs(case, len(devices))
    rng = np.random.default_rng(1)

    def add_batch(array):
        factors = (1 + rng.random((3, *(1,) * array.ndim))).astype(array.dtype)
        return np.moveaxis(array * factors, 0, -1)

    fields = inputs._asdict()
    inputs = inputs._replace(**{f: jax.tree.map(add_batch, fields[f]) for f in batched})
    axes = type(inputs)(*(-1 if field in batched else None for field in fields))

    def local(inputs):
        call = functools.partial(call_op, case, axis_name="tp")
        return jax.vmap(call, (axes,))(one_rank(inputs))

    call = jax.shard_map(local, mesh=mesh, in_specs=(in_specs(case),), out_specs=P())
    want = jax.vmap(functools.partial(unsharded, case), (axes,))(inputs)
    assert_close(jax.jit(call)(place(mesh, inputs, in_specs(case))), want)


@pytest.mark.parametrize("field", ["norm_scales", "layer_scalar", "next_norm_scales"])
def test_vmap_over_a_scale_needs_the_reference(mesh, field):
    """No kernel for one scale an example: implementation="cuda" must say so."""
    case = CASES["moe_tail"]
    inputs = make_inputs(case, 2)
    batched = jax.tree.map(lambda array: np.stack([array] * 3), getattr(inputs, field))
    axes = type(inputs)(*(None,) * len(inputs))._replace(**{field: 0})

    def local(inputs):
        call = functools.partial(call_op, case, axis_name="tp", implementation="cuda")
        return jax.vmap(call, (axes,))(one_rank(inputs))

    call = jax.shard_map(local, mesh=mesh, in_specs=(in_specs(case),), out_specs=P())
    with pytest.raises(NotImplementedError, match="norm scale or layer_scalar has a vmapped axis"):
        jax.eval_shape(call, inputs._replace(**{field: batched}))


@pytest.mark.parametrize("op", OPS)
def test_strict_promotion(mesh, op):
    """For users who forbid implicit rank and dtype promotion."""
    case = dataclasses.replace(
        CASES[op], leading=(2, 3), dtype=BF16, residual_dtype=F32, layer_scalar=(1,)
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.jit(tp_call(case, mesh))(make_inputs(case, 2))


def test_vmap_is_one_collective(mesh, case):
    """Folding the batch into the tokens must not multiply collectives."""
    inputs = make_inputs(case, 2)
    batch = tuple(np.stack([x] * 5, axis=1) for x in inputs.partial_sums)
    axes = type(inputs)(*(None,) * len(inputs))._replace(partial_sums=0)

    def local(inputs):
        call = functools.partial(call_op, case, axis_name="tp")
        return jax.vmap(call, (axes,))(one_rank(inputs))

    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(in_specs(case),), out_specs=P()))
    text = call.lower(inputs._replace(partial_sums=batch)).as_text()
    assert text.count("all_reduce") == case.branches


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_tokens(devices, case, leading):
    mesh = tp_mesh(devices)
    case = dataclasses.replace(case, leading=leading, dtype=BF16)
    placed = place(mesh, make_inputs(case, len(devices)), in_specs(case))
    for implementation in (None, "xla", "cuda"):
        outputs = jax.jit(tp_call(case, mesh, implementation=implementation))(placed)
        assert len(outputs) == 1 + case.next_norms
        assert {(out.shape, out.dtype.name) for out in outputs} == {((*leading, 640), "bfloat16")}


def test_axis_of_size_one(cpus, case):
    inputs = make_inputs(case, 1)
    outputs = jax.jit(tp_call(case, tp_mesh(cpus[:1])))(inputs)
    assert_matches(case, inputs, map(np.asarray, outputs), exact_sum=True)


def test_next_norms_come_as_they_went(mesh):
    """An array for an array, and a tuple or list for a tuple or list, of one as well."""
    row, scale = jax.ShapeDtypeStruct((4, 640), BF16), jax.ShapeDtypeStruct((640,), BF16)
    sums = jax.ShapeDtypeStruct((8, 640), BF16)
    sandwich = functools.partial(jga.fused_sandwich, axis_name="tp")
    moe = functools.partial(jga.fused_moe_tail, axis_name="tp")
    for next_norm_scale, normed in (
        (scale, row),
        ((scale,), (row,)),
        ((scale,) * 3, (row,) * 3),
        ([scale] * 2, [row] * 2),
    ):

        def local(x, residual, norm_scale, next_norm_scale):
            scales: dict[str, Any] = dict.fromkeys(TWO_BRANCHES.scales, norm_scale)
            return (
                sandwich(x, residual, norm_scale, next_norm_scale=next_norm_scale),
                moe(x, x, residual, **scales, next_norm_scale=next_norm_scale),
                moe(x, x, residual, **scales),
            )

        call = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P(), P()), out_specs=P())
        outputs = jax.eval_shape(call, sums, row, scale, next_norm_scale)
        assert outputs == ((row, normed), (row, normed), row)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("token_spec", [None, P("data")], ids=str)
def test_down_proj(devices, axis_type, token_spec):
    """The projection included, from outside shard_map, on a 2D mesh."""
    if len(devices) < 4:
        pytest.skip(f"needs 4 GPUs, found {len(devices)}")
    mesh = make_mesh((2, len(devices) // 2), ("data", "tp"), devices, axis_type)
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((4, 3, 64), np.float32)
    w_down = rng.standard_normal((64, 640), np.float32)
    residual = rng.standard_normal((4, 3, 640), np.float32)
    norm_scale, layer_scalar = np.ones(640, np.float32), np.float32(0.5)
    specs = (P("data", None, "tp"), P("tp", None), P("data"), P(), P())
    placed = place(mesh, (activations, w_down, residual, norm_scale, layer_scalar), specs)
    options = {"eps": 0.1, "scale_offset": 1.0}
    call = jax.jit(
        functools.partial(
            jga.down_proj_post_ff, mesh=mesh, axis_name="tp", token_spec=token_spec, **options
        )
    )
    out = call(*placed)
    arrays = (activations @ w_down, residual, norm_scale, layer_scalar)
    want = post_ff_tail(*map(jnp.asarray, arrays), **options)
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4)
    if token_spec is not None or axis_type == AxisType.Explicit:
        assert out.sharding.spec[0] == "data"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_down_proj_reshards(cpus, axis_type):
    """Operands that are sharded otherwise are gathered or sliced; implementation is passed on."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4], axis_type)
    rng = np.random.default_rng(0)
    shapes = (4, 64), (64, 640), (4, 640), (640,)
    arrays = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    want = post_ff_tail(*map(jnp.asarray, (arrays[0] @ arrays[1], *arrays[2:])))
    for specs in (
        (P(), P(), P(), P()),
        (P("data", "tp"), P("tp", "data"), P("data"), P("tp")),
        (P("tp"), P(None, "tp"), P(None, "data"), P()),
    ):
        placed = place(mesh, arrays, specs)
        call = functools.partial(jga.down_proj_post_ff, mesh=mesh, axis_name="tp")
        np.testing.assert_allclose(jax.jit(call)(*placed), want, rtol=2e-4, atol=2e-4)
    with pytest.raises(NotImplementedError, match="platform is cpu"):
        jax.jit(functools.partial(call, implementation="cuda"))(*placed)


def test_fallback_is_logged_once_per_reason(mesh, caplog, monkeypatch):
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level(logging.INFO, "jax_gemma_arf")
    for case in CASES.values():
        jax.jit(tp_call(case, mesh))(make_inputs(case, 2))
    messages = [record.message for record in caplog.records if record.name == "jax_gemma_arf"]
    assert messages == ["fused operations run as psum + tail: platform is cpu, not CUDA"]
