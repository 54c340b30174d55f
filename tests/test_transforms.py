"""fused_post_ff under JAX's transformations and on every kind of mesh, against the float64 oracle
or the unsharded computation. Everything runs on a CPU mesh and, where there are GPUs, on theirs."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BF16, F32, Case, assert_matches, make_inputs, oracle_float64
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from runners import make_mesh

import jax_gemma_arf as jga
from jax_gemma_arf import lowering
from jax_gemma_arf.reference import post_ff_tail

CASE = Case((8,), 640, F32)


@pytest.fixture(params=["cpu", "multi_gpu"])
def devices(request, cpus, require_gpus):
    """8 virtual CPUs, or 2, 4 or 8 GPUs."""
    if request.param == "cpu":
        return cpus
    require_gpus(2)
    found = jax.devices("cuda")
    return found[: 2 ** int(np.log2(min(len(found), 8)))]


def tp_mesh(devices, axis_type=AxisType.Auto):
    return make_mesh((len(devices),), ("tp",), devices, axis_type)


def put(mesh, arrays, specs):
    return [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]


def tail(mesh, axis_name="tp", **options):
    """fused_post_ff; on GPUs the kernel or an error, so that no fallback passes unnoticed."""
    implementation = "cuda" if on_gpus(mesh) else None
    return functools.partial(
        jga.fused_post_ff, axis_name=axis_name, **({"implementation": implementation} | options)
    )


def on_gpus(mesh) -> bool:
    return mesh.devices.flat[0].platform == "gpu"


def tp_call(mesh, *, check_vma=True, **options):
    """[N, ..., D] partial sums and replicated others -> [..., D]."""

    def local(x, residual, norm_scale, layer_scalar):
        return tail(mesh, **options)(x[0], residual, norm_scale, layer_scalar)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(P("tp"), P(), P(), P()), out_specs=P(), check_vma=check_vma
    )


def unsharded(x, residual, norm_scale, layer_scalar, **options):
    return post_ff_tail(x.sum(0), residual, norm_scale, layer_scalar, **options)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_call(devices, axis_type, check_vma, jit):
    mesh = tp_mesh(devices, axis_type)
    inputs = make_inputs(CASE, len(devices))
    call = tp_call(mesh, check_vma=check_vma)
    out = (jax.jit(call) if jit else call)(*put(mesh, inputs.operands(), (P("tp"), P(), P(), P())))
    expected = oracle_float64(CASE, inputs)
    assert_matches(CASE, inputs, np.asarray(out), expected, exact_sum=on_gpus(mesh))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("order", [("data", "tp"), ("tp", "data")], ids="x".join)
def test_2d_mesh(devices, order, axis_type):
    """Hazards 7, 8 and 25: each data shard is reduced over its own tp group and over no other."""
    if len(devices) < 4:
        pytest.skip(f"needs 4 GPUs, found {len(devices)}")
    tp = len(devices) // 2
    sizes = {"data": 2, "tp": tp}
    mesh = make_mesh(tuple(sizes[name] for name in order), order, devices, axis_type)
    inputs = make_inputs(CASE, tp)
    specs = (P("tp", "data"), P("data"), P(), P())

    def local(x, residual, norm_scale, layer_scalar):
        return tail(mesh)(x[0], residual, norm_scale, layer_scalar)

    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data")))
    out = np.asarray(call(*put(mesh, inputs.operands(), specs)))
    assert_matches(CASE, inputs, out, oracle_float64(CASE, inputs), exact_sum=on_gpus(mesh))


def test_several_axes(devices):
    """axis_name may be a tuple: the group is their product."""
    if len(devices) < 4:
        pytest.skip(f"needs 4 GPUs, found {len(devices)}")
    mesh = make_mesh((2, len(devices) // 2), ("a", "b"), devices)
    inputs = make_inputs(CASE, len(devices))
    specs = (P(("a", "b")), P(), P(), P())

    def local(x, *others):
        return tail(mesh, ("a", "b"))(x[0], *others)

    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    out = np.asarray(call(*put(mesh, inputs.operands(), specs)))
    assert_matches(CASE, inputs, out, oracle_float64(CASE, inputs), exact_sum=on_gpus(mesh))


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
            out_sharding=jax.NamedSharding(mesh, P(None, None, unreduced={"tp"})),
        )
        return jax.shard_map(
            functools.partial(jga.fused_post_ff, axis_name="tp"),
            mesh=mesh,
            in_specs=(P(unreduced={"tp"}), P(), P()),
            out_specs=P(),
        )(x, residual, norm_scale)

    placed = put(
        mesh, (activations, w_down, residual, norm_scale), (P(None, "tp"), P("tp"), P(), P())
    )
    expected = post_ff_tail(jnp.asarray(activations @ w_down), residual, norm_scale)
    np.testing.assert_allclose(np.asarray(call(*placed)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_grad(devices, axis_type, check_vma):
    """All four gradients, against the unsharded computation; remat must not change them."""
    mesh = tp_mesh(devices, axis_type)
    operands = make_inputs(CASE, len(devices)).operands()
    placed = put(mesh, operands, (P("tp"), P(), P(), P()))
    options = {"eps": 0.1, "scale_offset": 1.0}
    call = tp_call(mesh, check_vma=check_vma, **options)

    def loss(function, *operands):
        return jnp.sum(jnp.sin(function(*operands)))

    argnums = (1, 2, 3, 4)
    got = jax.jit(jax.grad(loss, argnums), static_argnums=0)(call, *placed)
    remat = jax.jit(jax.grad(loss, argnums), static_argnums=0)(jax.checkpoint(call), *placed)
    exact = functools.partial(unsharded, **options)
    want = jax.grad(loss, argnums)(exact, *map(jnp.asarray, operands))
    for one, two, three in zip(got, remat, want):
        np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(two, three, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual_spec", [P("data"), P()], ids=str)
def test_types(cpus, residual_spec):
    """What the result varies over, and that gradients of operands that do not vary are summed."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4])
    sharded = residual_spec == P("data")
    x, norm_scale = np.ones((2, 4, 640), F32), np.full(640, 0.5, F32)
    residual = np.ones((4 if sharded else 2, 640), F32)

    def local(x, residual, norm_scale):
        def loss(residual, norm_scale):
            out = jga.fused_post_ff(x[0], residual, norm_scale, axis_name="tp")
            assert jax.typeof(out).manual_axis_type.varying == {"data"}
            assert not jax.typeof(out).weak_type
            return jax.lax.psum(jnp.sum(out * out), "data")

        return jax.grad(loss, (0, 1))(residual, norm_scale)

    def unsharded_loss(residual, norm_scale):
        full = residual if sharded else jnp.concatenate([residual] * 2)
        out = post_ff_tail(jnp.asarray(x.sum(0)), full, norm_scale)
        return jnp.sum(out * out)

    specs = (P("tp", "data"), residual_spec, P())
    call = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(residual_spec, P()))
    got = jax.jit(call)(x, residual, norm_scale)
    want = jax.grad(unsharded_loss, (0, 1))(jnp.asarray(residual), jnp.asarray(norm_scale))
    for one, two in zip(got, want):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_python_scalar_under_x64(mesh):
    operands = make_inputs(CASE, 2).operands()[:3]

    def local(x, *others):
        return jga.fused_post_ff(x[0], *others, 0.5, axis_name="tp")

    call = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P())
    with jax.enable_x64(True):
        out = jax.jit(call)(*operands)
    want = unsharded(*map(jnp.asarray, operands), jnp.float32(0.5))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert out.dtype == F32


def test_scan_and_while(devices):
    """A decode loop: each step's residual is the last step's output."""
    mesh = tp_mesh(devices)
    inputs = make_inputs(CASE, len(devices))
    placed = put(mesh, inputs.operands(), (P("tp"), P(), P(), P()))
    steps = 5

    def scanned(x, residual, *scales):
        def step(hidden, _):
            return tail(mesh)(x[0], hidden, *scales), None

        return jax.lax.scan(step, residual, length=steps)[0]

    def looped(x, residual, *scales):
        def step(state):
            return state[0] + 1, tail(mesh)(x[0], state[1], *scales)

        return jax.lax.while_loop(lambda state: state[0] < steps, step, (0, residual))[1]

    x, residual, norm_scale, layer_scalar = map(jnp.asarray, inputs.operands())
    for _ in range(steps):
        residual = unsharded(x, residual, norm_scale, layer_scalar)
    for body in (scanned, looped):
        call = jax.shard_map(body, mesh=mesh, in_specs=(P("tp"), P(), P(), P()), out_specs=P())
        np.testing.assert_allclose(jax.jit(call)(*placed), residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "batched",
    ["x", "residual", "both", "norm_scale", "layer_scalar"],
)
def test_vmap(devices, batched):
    """vmap inside the shard_map, over any operand, the batch axis last."""
    mesh = tp_mesh(devices)
    size, which = (
        3,
        {"x": {0}, "residual": {1}, "both": {0, 1}, "norm_scale": {2}}.get(batched, {3}),
    )
    rng = np.random.default_rng(1)
    operands = [jnp.asarray(a) for a in make_inputs(CASE, len(devices)).operands()]
    for i in which:
        factor = 1 + rng.random((size, *(1,) * operands[i].ndim), np.float32)
        operands[i] = operands[i] * factor
    operands = [jnp.moveaxis(a, 0, -1) if i in which else a for i, a in enumerate(operands)]
    axes = tuple(-1 if i in which else None for i in range(4))

    def local(x, *others):
        return jax.vmap(functools.partial(jga.fused_post_ff, axis_name="tp"), axes)(x[0], *others)

    specs = (P("tp"), P(), P(), P())
    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    want = jax.vmap(unsharded, axes)(*operands)
    np.testing.assert_allclose(call(*put(mesh, operands, specs)), want, rtol=1e-4, atol=1e-4)


def test_vmap_over_a_scale_needs_the_reference(mesh):
    """No kernel for one scale an example: implementation="cuda" must say so."""

    def local(x, residual, norm_scale):
        call = functools.partial(jga.fused_post_ff, axis_name="tp", implementation="cuda")
        return jax.vmap(call, (None, None, 0))(x[0], residual, norm_scale)

    call = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P())
    operands = np.ones((2, 4, 640), F32), np.ones((4, 640), F32), np.ones((3, 640), F32)
    with pytest.raises(NotImplementedError, match="norm_scale or layer_scalar has a vmapped axis"):
        jax.eval_shape(call, *operands)


def test_strict_promotion(mesh):
    """For users who forbid implicit rank and dtype promotion."""
    operands = make_inputs(Case((2, 3), 640, residual_dtype=F32, layer_scalar=(1,)), 2).operands()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.jit(tp_call(mesh))(*operands)


def test_vmap_is_one_collective(mesh):
    """Folding the batch into the tokens must not multiply collectives."""

    def local(x, residual, norm_scale):
        call = functools.partial(jga.fused_post_ff, axis_name="tp")
        return jax.vmap(call, (0, None, None))(x[0], residual, norm_scale)

    call = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))
    operands = np.ones((2, 5, 4, 640), F32), np.ones((4, 640), F32), np.ones(640, F32)
    assert call.lower(*operands).as_text().count("all_reduce") == 1


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_tokens(devices, leading):
    mesh = tp_mesh(devices)
    x = np.zeros((len(devices), *leading, 640), BF16)
    operands = (x, x[0], np.ones(640, BF16), np.ones((), BF16))
    placed = put(mesh, operands, (P("tp"), P(), P(), P()))
    for implementation in (None, "xla", "cuda"):
        out = jax.jit(tp_call(mesh, implementation=implementation))(*placed)
        assert out.shape == (*leading, 640)
        assert out.dtype == BF16


def test_axis_of_size_one(cpus):
    mesh = tp_mesh(cpus[:1])
    inputs = make_inputs(CASE, 1)
    out = np.asarray(jax.jit(tp_call(mesh))(*inputs.operands()))
    assert_matches(CASE, inputs, out, oracle_float64(CASE, inputs), exact_sum=True)


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
    placed = put(mesh, (activations, w_down, residual, norm_scale, layer_scalar), specs)
    options = {"eps": 0.1, "scale_offset": 1.0}
    call = jax.jit(
        functools.partial(
            jga.down_proj_post_ff, mesh=mesh, axis_name="tp", token_spec=token_spec, **options
        )
    )
    out = call(*placed)
    product = jnp.asarray(activations @ w_down)
    want = post_ff_tail(product, residual, norm_scale, jnp.asarray(layer_scalar), **options)
    np.testing.assert_allclose(out, want, rtol=2e-4, atol=2e-4)
    if token_spec is not None or axis_type == AxisType.Explicit:
        assert out.sharding.spec[0] == "data"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_down_proj_reshards(cpus, axis_type):
    """Operands that are sharded otherwise are gathered or sliced; implementation is passed on."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4], axis_type)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s, np.float32) for s in ((4, 64), (64, 640), (4, 640), (640,))]
    want = post_ff_tail(jnp.asarray(arrays[0] @ arrays[1]), *arrays[2:])
    for specs in (
        (P(), P(), P(), P()),
        (P("data", "tp"), P("tp", "data"), P("data"), P("tp")),
        (P("tp"), P(None, "tp"), P("tp", "data"), P()),
    ):
        placed = put(mesh, arrays, specs)
        call = functools.partial(jga.down_proj_post_ff, mesh=mesh, axis_name="tp")
        np.testing.assert_allclose(jax.jit(call)(*placed), want, rtol=2e-4, atol=2e-4)
    with pytest.raises(NotImplementedError, match="platform is cpu"):
        jax.jit(functools.partial(call, implementation="cuda"))(*placed)


def test_fallback_is_logged_once_per_reason(mesh, caplog, monkeypatch):
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level(logging.INFO, "jax_gemma_arf")
    operands = make_inputs(CASE, 2).operands()
    for _ in range(2):
        jax.jit(tp_call(mesh))(*operands)
    messages = [record.message for record in caplog.records if record.name == "jax_gemma_arf"]
    assert messages == ["fused_post_ff runs as psum + tail: platform is cpu, not CUDA"]
