"""implementation="flashinfer", without a GPU. test_tails.py runs its kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.runners import make_mesh
from jax_gemma_arf._src import extension, lowering
from jax_gemma_arf._src.operands import TWO_BRANCHES, Operands
from jax_gemma_arf.loopback import loopback_tail

X, SCALE = jax.ShapeDtypeStruct((4, 640), jnp.bfloat16), jax.ShapeDtypeStruct((640,), jnp.bfloat16)
CALLS = {
    "fused_post_ff": lambda x, w: jga.fused_post_ff(
        x, x, w, axis_name="tp", implementation="flashinfer"
    ),
    "fused_sandwich": lambda x, w: jga.fused_sandwich(
        x, x, w, next_norm_scale=w, axis_name="tp", implementation="flashinfer"
    ),
    "fused_all_reduce_norm": lambda x, w: jga.fused_all_reduce_norm(
        x, w, axis_name="tp", implementation="flashinfer"
    ),
}


def on_mesh(call, mesh):
    return jax.jit(
        jax.shard_map(call, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    )


def test_handlers_register(flashinfer):
    mesh, loopback = lowering.TARGETS["flashinfer"]
    stages = {"instantiate", "initialize", "execute"}
    registered = flashinfer.registrations()
    assert {name: set(handlers) for name, handlers in registered.items()} == {
        mesh: stages | {"prepare"},
        loopback: stages,
    }
    assert flashinfer.flashinfer_version


@pytest.mark.parametrize("name", CALLS)
def test_lowers_to_one_call_of_its_own(flashinfer, mesh, name):
    text = on_mesh(CALLS[name], mesh).trace(X, SCALE).lower(lowering_platforms=("cuda",)).as_text()
    target, _ = lowering.TARGETS["flashinfer"]
    assert text.count(f"@{target}(") == 1
    assert f"@{lowering.TARGET_NAME}(" not in text
    assert "all_reduce" not in text


@pytest.mark.parametrize("name", CALLS)
def test_missing(monkeypatch, mesh, name):
    """The error says how to build it, at trace time; so does fusion_support."""
    monkeypatch.delitem(extension._modules, "flashinfer", raising=False)
    monkeypatch.setitem(extension._why_missing, "flashinfer", extension._BUILD_FLASHINFER)
    with pytest.raises(
        NotImplementedError, match=r'"flashinfer": .*make flashinfer, or pip install'
    ):
        on_mesh(CALLS[name], mesh).trace(X, SCALE)
    ones = Operands((jnp.ones((2, 4, 640)),), (jnp.ones(640),))
    with pytest.raises(NotImplementedError, match=r"loopback needs the .*: .*make flashinfer"):
        loopback_tail(ones, implementation="flashinfer")


def test_runs_on_gpus_alone(flashinfer, mesh):
    """On CPUs it is an error, as "cuda" is."""
    with pytest.raises(NotImplementedError, match=r'"flashinfer" was asked for, but .* not CUDA'):
        on_mesh(CALLS["fused_post_ff"], mesh)(jnp.ones(X.shape, X.dtype), jnp.ones(640, X.dtype))


def test_no_moe_tail(mesh):
    def call(x, w):
        scales: dict[str, Any] = dict.fromkeys(TWO_BRANCHES.scales, w)
        return jga.fused_moe_tail(x, x, x, **scales, axis_name="tp", implementation="flashinfer")

    with pytest.raises(NotImplementedError, match=r"flashinfer.* is not there for fused_moe_tail"):
        on_mesh(call, mesh).trace(X, SCALE)


def test_support(flashinfer):
    """Limits of its own, and the same objections as for our kernels where they are the same."""
    mesh = jax.sharding.AbstractMesh((2,), ("tp",))

    def support(tokens, implementation, **options: Any):
        options |= {"mesh": mesh, "axis_name": "tp", "implementation": implementation}
        return jga.fusion_support((tokens, 5376), jnp.bfloat16, **options)

    assert support(4, "flashinfer").reason == "one one-shot launch of FlashInfer's over 2 ranks"
    assert support(1024, None).algorithm == "two_shot"
    assert support(1024, "flashinfer").algorithm == "one_shot"
    assert "reduce one message" in support(4, "flashinfer", op="fused_moe_tail").reason
    assert support(100000, "flashinfer").reason == support(100000, "cuda").reason
    with pytest.raises(ValueError, match='implementation must be "cuda", "flashinfer" or None'):
        support(4, "xla")


@pytest.mark.parametrize("wrong", ["FlashInfer", "nccl"])
def test_bad_implementation(mesh, wrong):
    def call(x, w):
        return jga.fused_post_ff(x, x, w, axis_name="tp", implementation=wrong)

    with pytest.raises(ValueError, match=f'"cuda", "flashinfer", "xla" or None, got \'{wrong}\''):
        on_mesh(call, mesh).trace(X, SCALE)


def test_exports(flashinfer, mesh):
    """DISABLED_EXPORT_CHECKS names its target, too."""
    exported = jax.export.export(
        on_mesh(CALLS["fused_sandwich"], mesh),
        platforms=("cuda",),
        disabled_checks=jga.DISABLED_EXPORT_CHECKS,
    )(X, SCALE)
    assert lowering.TARGETS["flashinfer"][0] in exported.mlir_module()


def test_gemma_models_take_it(flashinfer):
    """Two calls a layer of a whole model."""
    from helpers import gemma_models  # noqa: PLC0415
    from jax_gemma_arf.integrations.gemma import tensor_parallel  # noqa: PLC0415

    mesh = make_mesh((2,), ("tp",), jax.devices("cpu")[:2])
    official = gemma_models.official("31B")
    model = tensor_parallel(official, mesh, implementation="flashinfer")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = gemma_models.shapes("31B")
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    text = apply.trace(params, tokens).lower(lowering_platforms=("cuda",)).as_text()
    target, _ = lowering.TARGETS["flashinfer"]
    assert text.count(f"@{target}(") == 2 * official.config.num_layers
