"""Cross-lowering for CUDA on any machine: what the compiler will see."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.cases import BF16, OPS, Case, Inputs, make_inputs
from helpers.runners import call_op, in_specs, make_mesh, one_rank
from jax_gemma_arf._src import decision, lowering
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_post_ff, loopback_tail

pytestmark = pytest.mark.usefixtures("built")


def lowered(
    mesh,
    op="post_ff",
    *,
    shape=(4, 5376),
    next_norms=None,
    manual=None,
    axis_name="tp",
    dialect="stablehlo",
    **options,
) -> str:
    """One call lowered for CUDA, as text."""
    if next_norms is None:
        next_norms = int(op == "sandwich")
    *leading, width = shape
    case = Case(tuple(leading), width, BF16, op=op, next_norms=next_norms)
    specs = in_specs(case, P(axis_name))
    row, scale = tuple(shape), (width,)
    shapes = Inputs(
        partial_sums=((mesh.shape[axis_name], *row),) * case.branches,
        norm_scales=(scale,) * (2 * case.branches - 1),
        residual=row if case.has_residual else None,
        layer_scalar=() if case.has_layer_scalar else None,
        next_norm_scales=(scale,) * next_norms,
    )
    operands = jax.tree.map(
        lambda spec, shape: jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec)
        ),
        specs,
        shapes,
    )

    def local(inputs):
        return call_op(case, one_rank(inputs), axis_name=axis_name, **options)

    call = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
        **({} if manual is None else {"axis_names": manual}),
    )
    return jax.jit(call).trace(operands).lower(lowering_platforms=("cuda",)).as_text(dialect)


def counts(text: str) -> tuple[int, int]:
    """How many of our calls and how many all-reduces."""
    return text.count(f"@{lowering.TARGET_NAME}"), text.count("all_reduce")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("op", OPS)
def test_one_call_and_no_all_reduce(cpus, op, ranks, axis_type):
    mesh = make_mesh((ranks,), ("tp",), cpus[:ranks], axis_type)
    assert counts(lowered(mesh, op, implementation="cuda")) == (1, 0)
    assert counts(lowered(mesh, op)) == (1, 0)
    assert counts(lowered(mesh, op, implementation="xla")) == (0, 2 if op == "moe_tail" else 1)


@pytest.mark.parametrize("op", OPS)
def test_target_name(mesh, op):
    """The public name finds the call, as docs/reference/support.md says."""
    assert jga.TARGET_NAME == "jax_gemma_arf.tail"
    assert lowered(mesh, op).count(f"@{jga.TARGET_NAME}(") == 1
    assert f'custom_call_target="{jga.TARGET_NAME}"' in lowered(mesh, op, dialect="hlo")


def test_psum_is_in_the_dtype_of_x(mesh):
    """The psum implementation adds what the model did before, not float32."""
    text = lowered(mesh, implementation="xla")
    (types,) = re.findall(r"all_reduce.*?\}\) : (\(.*?\) -> \S+)", text, re.DOTALL)
    assert types == "(tensor<4x5376xbf16>) -> tensor<4x5376xbf16>"


def test_the_rounding_of_hidden_is_pinned(mesh):
    """XLA drops a pair of conversions on GPUs, but not a reduce_precision."""
    text = lowered(mesh, "sandwich", implementation="xla")
    assert "format = e8m7" in text


def test_abstract_mesh():
    """No device at all: the lowering depends on static facts only."""
    mesh = jax.sharding.AbstractMesh((2,), ("tp",))

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x, residual, norm_scale, axis_name="tp", implementation="cuda")

    call = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P())

    traced = jax.jit(call).trace(
        *(
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
            for shape, spec in (((8, 640), P("tp")), ((4, 640), P()), ((640,), P()))
        )
    )
    assert counts(traced.lower(lowering_platforms=("cuda",)).as_text()) == (1, 0)


@pytest.mark.parametrize(
    ("shape", "axes", "groups"),
    [
        ((2, 4), ("data", "tp"), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((4, 2), ("tp", "data"), [0, 2, 4, 6, 1, 3, 5, 7]),
    ],
)
def test_attributes(cpus, shape, axes, groups):
    """Everything that the handler needs, with groups from the mesh (hazards 7 and 25)."""
    mesh = make_mesh(shape, axes, cpus)
    text = lowered(mesh, eps=1e-5, scale_offset=1.0)
    (config,) = re.findall(r"backend_config = \{(.*?)\}", text)
    assert 'algorithm = "one_shot"' in config
    assert "axis_size = 4 : i64" in config
    assert "max_ctas = 0 : i64" in config
    assert "scale_offset = 1.000000e+00 : f32" in config
    assert f"replica_groups = dense<{groups}>" in config
    assert "eps = 9.99999974E-6 : f32" in config


@pytest.mark.parametrize(
    ("op", "next_norms", "attributes", "operands"),
    [
        ("post_ff", 0, (1, "true", "true", 0), ["x", "d", "x", "1"]),
        ("sandwich", 3, (1, "true", "true", 3), ["x", "d", "x", "1", "d", "d", "d"]),
        ("all_reduce_norm", 0, (1, "false", "false", 0), ["x", "d"]),
        ("moe_tail", 1, (2, "true", "true", 1), ["x", "x", "d", "d", "d", "x", "1", "d"]),
    ],
)
def test_tail_attributes(mesh, op, next_norms, attributes, operands):
    """Which tail it is, and the order of what it reads and writes, as ffi/call.cc has it."""
    text = lowered(mesh, op, next_norms=next_norms)
    (config,) = re.findall(r"backend_config = \{(.*?)\}", text)
    names = ("branches", "has_residual", "has_layer_scalar", "next_norms")
    for name, value in zip(names, attributes):
        assert re.search(rf"\b{name} = {value}\b", config), config
    types = {"x": "4x5376xbf16", "d": "5376xbf16", "1": "bf16"}
    row = "tensor<4x5376xbf16>"
    results = row if next_norms == 0 else f"({', '.join([row] * (1 + next_norms))})"
    signature = f"({', '.join(f'tensor<{types[name]}>' for name in operands)}) -> {results}"
    (call,) = [line for line in text.splitlines() if f"@{lowering.TARGET_NAME}(" in line]
    assert call.endswith(signature)


def test_branches_count_alike(mesh):
    """Two branches are one message: the rule sees the bytes of both."""
    tokens = decision.one_shot_max_bytes(2) // (2 * 5376)
    options = {"shape": (tokens, 5376), "implementation": "cuda"}
    assert 'algorithm = "one_shot"' in lowered(mesh, **options)
    assert 'algorithm = "two_shot"' in lowered(mesh, "moe_tail", **options)


@pytest.mark.parametrize("op", OPS)
def test_loopback_tail(op):
    """One call for all ranks, that takes what the mesh's takes."""
    case = Case((3,), 640, BF16, op=op, next_norms=int(op == "sandwich"))
    call = functools.partial(loopback_tail, max_ctas=16, absent_rank=1)
    operands = jax.tree.map(jnp.asarray, Operands(*make_inputs(case, 4)))
    traced = jax.jit(call).trace(operands)
    shapes = {(out.shape, out.dtype.name) for out in traced.out_info}
    assert shapes == {((4, 3, 640), "bfloat16")}
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{lowering.LOOPBACK_TARGET}") == 1
    for attribute in (f"branches = {case.branches}", "max_ctas = 16", "absent_rank = 1"):
        assert attribute in text


def test_loopback_attributes():
    """The same attributes, for all ranks of one device, and the bound on thread blocks."""
    call = functools.partial(loopback_post_ff, max_ctas=16, scale_offset=1.0)
    operands = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4, 3, 640), (3, 640), (640,)))
    text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{lowering.LOOPBACK_TARGET}") == 1
    for attribute in (
        "axis_size = 4",
        "max_ctas = 16",
        "scale_offset = 1.0",
        "dense<[0, 1, 2, 3]>",
    ):
        assert attribute in text


def test_two_shot_above_the_limit(mesh):
    text = lowered(mesh, shape=(2048, 5376))
    assert 'algorithm = "two_shot"' in text
    assert counts(text) == (1, 0)


def test_partly_manual_mesh_falls_back(cpus):
    """XLA would gather the operands of a custom call over an axis that it still partitions."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4])
    assert counts(lowered(mesh, manual={"tp"})) == (0, 1)
    with pytest.raises(NotImplementedError, match=r"mesh axes \['data'\] are not manual"):
        lowered(mesh, manual={"tp"}, implementation="cuda")


def test_unsupported_width_falls_back(mesh):
    assert counts(lowered(mesh, shape=(4, 1000))) == (0, 1)
    with pytest.raises(NotImplementedError, match="D must be a multiple of 64"):
        lowered(mesh, shape=(4, 1000), implementation="cuda")


@pytest.mark.parametrize(
    "case",
    [
        ((4, 5376), 1, "INFO"),
        ((4, 5376), 3, "WARNING"),
        ((4, 1000), 2, "WARNING"),
    ],
)
def test_fallback_on_cuda_is_a_warning(cpus, caplog, monkeypatch, case):
    """Unless psum is what is wanted."""
    shape, ranks, level = case
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level("INFO", "jax_gemma_arf")
    mesh = make_mesh((ranks,), ("tp",), cpus[:ranks])
    assert counts(lowered(mesh, shape=shape))[0] == 0
    assert [record.levelname for record in caplog.records] == [level]


def test_reasons_are_logged_once_whatever_their_numbers(mesh, cpus, caplog, monkeypatch):
    """Once per code: neither other numbers nor other names make a second record."""
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level("INFO", "jax_gemma_arf")
    for width in (1000, 1001, 1002):
        lowered(mesh, shape=(4, width))
    assert len(caplog.records) == 1
    others = make_mesh((2, 3), ("data", "tp"), cpus[:6])
    lowered(others, shape=(4, 1000), manual={"tp"})
    lowered(make_mesh((2, 2), ("rows", "tp"), cpus[:4]), manual={"tp"})
    assert [vars(record)["code"] for record in caplog.records] == [
        *("width", "ranks", "partly_manual")
    ]


def test_codes_of_the_lowering(mesh, caplog, monkeypatch):
    """Reasons that only a trace or a lowering can see have codes too."""
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level("INFO", "jax_gemma_arf")

    def local(x, residual, norm_scales):
        call = functools.partial(jga.fused_post_ff, axis_name="tp")
        return jax.vmap(call, (None, None, 0))(x[0], residual, norm_scales)

    def mapped(call):
        return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 4, 640), (4, 640), (3, 640))]
    mapped(local).trace(*shapes)
    call = mapped(
        lambda x, residual, scales: jga.fused_post_ff(x[0], residual, scales[0], axis_name="tp")
    )
    jax.export.export(call, platforms=("cuda", "cpu"))(*shapes)
    codes = {vars(record)["code"]: record.levelname for record in caplog.records}
    assert codes == {"vmapped_scale": "WARNING", "several_platforms": "WARNING", "platform": "INFO"}


def test_an_error_gives_all_reasons(cpus):
    mesh = make_mesh((3,), ("tp",), cpus[:3])
    with pytest.raises(NotImplementedError, match=r"must have 2, 4 or 8 ranks.*; D must be"):
        lowered(mesh, shape=(4, 1000), implementation="cuda")


def test_switched_off_is_all_that_is_logged(mesh, caplog, monkeypatch):
    """Nothing else has to change then."""
    monkeypatch.setattr(lowering, "_logged", set())
    monkeypatch.setenv("JAX_GEMMA_ARF_DISABLE", "1")
    caplog.set_level("INFO", "jax_gemma_arf")
    lowered(mesh, shape=(4, 1000))
    assert [vars(record)["code"] for record in caplog.records] == ["switched_off"]


def test_symbolic_shape_falls_back(mesh):
    """Exported with a batch size that is not known yet."""

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x[0], residual, norm_scale, axis_name="tp")

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))
    (tokens,) = jax.export.symbolic_shape("b")
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((2, tokens, 640), (tokens, 640), (640,))
    ]
    exported = jax.export.export(mapped, platforms=("cuda",))(*operands)
    assert counts(exported.mlir_module()) == (0, 1)


def test_switch(mesh, monkeypatch):
    monkeypatch.setenv("JAX_GEMMA_ARF_DISABLE", "1")
    assert counts(lowered(mesh)) == (0, 1)


@pytest.mark.parametrize("op", OPS)
def test_vmap_is_one_call(mesh, op):
    case = Case((3, 4), 640, op=op, next_norms=int(op == "sandwich"))

    def local(inputs):
        axes = Inputs(0, None, 0 if case.has_residual else None, None, None)
        call = functools.partial(call_op, case, axis_name="tp", implementation="cuda")
        return jax.vmap(call, (axes,))(one_rank(inputs))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(in_specs(case),), out_specs=P())
    traced = jax.jit(mapped).trace(make_inputs(case, 2))
    assert counts(traced.lower(lowering_platforms=("cuda",)).as_text()) == (1, 0)


def test_export(mesh):
    """jax.export for CUDA, with the call's name allowed; for CPUs as well, without the call."""

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x[0], residual, norm_scale, axis_name="tp")

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))
    shapes = (2, 4, 640), (4, 640), (640,)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    for platforms, expected in ((("cuda",), (1, 0)), (("cuda", "cpu"), (0, 2))):  # one a platform
        export = jax.export.export(
            mapped, platforms=platforms, disabled_checks=jga.DISABLED_EXPORT_CHECKS
        )
        assert counts(export(*operands).mlir_module()) == expected


REMAT = {
    "saved": lambda block: block,
    "saved by name": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(lowering.SAVED_SUMS),
    ),
}


@pytest.mark.parametrize("remat", REMAT.values(), ids=REMAT)
@pytest.mark.parametrize(("platform", "calls"), [("cpu", 0), ("cuda", 2)])
def test_backward_does_not_repeat_the_all_reduce(cpus, remat, platform, calls):
    """Each half of a block reduces once forward, its result, and once backward, the gradient of its
    input: hazard 40."""
    mesh = make_mesh((2,), ("tp",), cpus[:2])
    layers = 3

    def half(h, weights):
        up, down = weights
        partial_sums = jnp.tanh(h @ up) @ down
        return jga.fused_post_ff(partial_sums, h, jnp.ones(256, h.dtype), axis_name="tp")

    def loss(weights, h):
        for _ in range(2 * layers):
            h = remat(half)(h, weights)
        return jnp.sum(h)

    def local(weights, h):
        return jax.grad(loss, (0, 1))(weights, h)

    specs = (P(None, "tp"), P("tp"))
    call = jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P()))
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, 64), (64, 256), (4, 256))]
    traced = jax.jit(call).trace((shapes[0], shapes[1]), shapes[2])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    forward = 2 * layers
    assert counts(text) == ((forward, forward) if calls else (0, 2 * forward))
