"""Cross-lowering for CUDA on any machine: what the compiler will see."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from runners import make_mesh

import jax_gemma_arf as jga
from jax_gemma_arf import lowering
from jax_gemma_arf.loopback import loopback_post_ff

pytestmark = pytest.mark.usefixtures("built")


def lowered(mesh, *, shape=(4, 5376), manual=None, axis_name="tp", **options) -> str:
    """StableHLO for CUDA of one call, as text."""
    specs = (P(axis_name), P(), P(), P())

    def local(x, *others):
        return jga.fused_post_ff(x[0], *others, axis_name=axis_name, **options)

    call = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
        **({} if manual is None else {"axis_names": manual}),
    )
    ranks = mesh.shape[axis_name]
    operands = [
        jax.ShapeDtypeStruct(operand, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
        for operand, spec in zip(((ranks, *shape), shape, shape[-1:], ()), specs)
    ]
    return jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def counts(text: str) -> tuple[int, int]:
    """How many of our calls and how many all-reduces."""
    return text.count(f"@{lowering.MESH_TARGET}"), text.count("all_reduce")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_one_call_and_no_all_reduce(cpus, ranks, axis_type):
    mesh = make_mesh((ranks,), ("tp",), cpus[:ranks], axis_type)
    assert counts(lowered(mesh, implementation="cuda")) == (1, 0)
    assert counts(lowered(mesh)) == (1, 0)
    assert counts(lowered(mesh, implementation="xla")) == (0, 1)


def test_psum_is_in_the_dtype_of_x(mesh):
    """The psum implementation adds what the model did before, not float32."""
    text = lowered(mesh, implementation="xla")
    (types,) = re.findall(r"all_reduce.*?\}\) : (\(.*?\) -> \S+)", text, re.DOTALL)
    assert types == "(tensor<4x5376xbf16>) -> tensor<4x5376xbf16>"


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
    config = re.search(r"backend_config = \{(.*?)\}", text).group(1)
    assert 'algorithm = "one_shot"' in config
    assert "axis_size = 4 : i64" in config
    assert "max_ctas = 0 : i64" in config
    assert "scale_offset = 1.000000e+00 : f32" in config
    assert f"replica_groups = dense<{groups}>" in config
    assert "eps = 9.99999974E-6 : f32" in config


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
    text = lowered(mesh, shape=(2048, 5376), implementation="cuda")
    assert 'algorithm = "two_shot"' in text
    assert counts(lowered(mesh, shape=(2048, 5376))) == (0, 1)


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
        ((2048, 5376), 2, "INFO"),
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


def test_reasons_are_logged_once_whatever_their_numbers(mesh, caplog, monkeypatch):
    monkeypatch.setattr(lowering, "_logged", set())
    caplog.set_level("INFO", "jax_gemma_arf")
    for hidden in (1000, 1001, 1002):
        lowered(mesh, shape=(4, hidden))
    assert len(caplog.records) == 1


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


def test_vmap_is_one_call(mesh):

    def local(x, residual, norm_scale):
        call = functools.partial(jga.fused_post_ff, axis_name="tp", implementation="cuda")
        return jax.vmap(call, (0, 0, None))(x[0], residual, norm_scale)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P())
    operands = np.ones((2, 3, 4, 640), np.float32), np.ones((3, 4, 640), np.float32)
    traced = jax.jit(mapped).trace(*operands, np.ones(640, np.float32))
    assert counts(traced.lower(lowering_platforms=("cuda",)).as_text()) == (1, 0)


def test_export(mesh):
    """jax.export for CUDA, with the call's name allowed."""

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x[0], residual, norm_scale, axis_name="tp")

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("tp"), P(), P()), out_specs=P()))
    check = jax.export.DisabledSafetyCheck.custom_call(lowering.MESH_TARGET)
    exported = jax.export.export(mapped, platforms=("cuda",), disabled_checks=[check])(
        np.ones((2, 4, 640), np.float32), np.ones((4, 640), np.float32), np.ones(640, np.float32)
    )
    assert counts(exported.mlir_module()) == (1, 0)
