"""The integration itself: what is compiled, how arrays lie, and what is refused."""

import functools
import pickle
import re
from typing import Any, cast

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from helpers.gemma_models import ckpts, gemma3n, off, sharded
from helpers.runners import make_mesh
from jax_gemma_arf._src import lowering
from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel

all_variants = pytest.mark.parametrize("variant", sizes.VARIANTS)


def lowered(variant: str, mesh, platform: str, implementation=None, **changes) -> str:
    """StableHLO of the whole model in bfloat16, as text. changes: of the config."""
    model = gemma_models.official(variant, dtype=jnp.bfloat16, **changes)
    model = tensor_parallel(model, mesh, implementation=implementation)
    tokens = jax.ShapeDtypeStruct((sizes.BATCH, sizes.TOKENS), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = gemma_models.structs(shapes, param_shardings(model), jnp.bfloat16)
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
    return apply.trace(params, tokens).lower(lowering_platforms=(platform,)).as_text()


def lookups(variant: str) -> int:
    """How many tables a model looks its tokens up in, with a collective each."""
    return 2 if variant == "E2B" else 1


def row_norms(text: str) -> int:
    """How many RMSNorms over D there are: one rsqrt a token, unlike those over heads."""
    return len(re.findall(rf"rsqrt .*tensor<{sizes.BATCH}x{sizes.TOKENS}x1xb?f\d+>", text))


@all_variants
def test_two_calls_a_layer(variant, mesh, built):
    """Lowered for CUDA, a layer is two launches, without an all-reduce or a norm of its own."""
    text = lowered(variant, mesh, "cuda", "cuda")
    layers = sizes.LAYERS[variant]
    assert text.count(f"@{lowering.TARGET_NAME}") == 2 * layers
    assert "stablehlo.all_reduce" not in text
    assert text.count("stablehlo.all_gather") == lookups(variant)
    assert "stablehlo.partition_id" not in text
    # The norm before the first layer. E2B's per-layer branch has a norm, and moves the next one out
    # of the fused call; the experts' router has one.
    assert row_norms(text) == 1 + {"E2B": 2, "26B": 1}.get(variant, 0) * layers


@all_variants
def test_all_reduces_without_the_kernel(variant, mesh):
    """One for each site, and for the second branch of an MoE layer."""
    text = lowered(variant, mesh, "cpu")
    layers = sizes.LAYERS[variant]
    tails = (3 if variant == "26B" else 2) * layers
    assert text.count("stablehlo.all_reduce") == tails
    assert text.count("stablehlo.all_gather") == lookups(variant)
    assert row_norms(text) >= 4 * layers


@all_variants
def test_tables_are_used_in_parts(variant, mesh):
    """No lookup or matmul takes a whole table, so the compiler has none to gather."""
    text = lowered(variant, mesh, "cpu", num_embed=1000)  # no other axis is as long
    operands = re.findall(r"stablehlo\.(?:gather|dot_general).* : \(([^)]*)\)", text)
    assert sum(bool(re.search("[<x]500x", shapes)) for shapes in operands) == lookups(variant) + 1
    assert not any(re.search("[<x]1000x", shapes) for shapes in operands)


@pytest.mark.parametrize("variant", ["31B", "E2B"])
@pytest.mark.parametrize("vocabulary", [sizes.VOCAB, sizes.VOCAB - 1], ids=["divided", "whole"])
def test_token_ids(variant, vocabulary):
    """Ids out of range count from the end or are clamped, as in the official model, also where the
    ranks do not divide the vocabulary."""
    official = gemma_models.official(variant, num_embed=vocabulary)
    host = gemma_models.params(variant)
    host["embedder"] = {
        name: leaf[:vocabulary] if "embedding" in name else leaf
        for name, leaf in host["embedder"].items()
    }
    model, params = sharded(official, host)
    spec = params["embedder"]["input_embedding"].sharding.spec
    assert spec == (P(("tp",)) if vocabulary == sizes.VOCAB else P())
    tokens = np.array([[1, 31, 32, -1, -2, 62], [63, 64, 70, 1 << 20, -70, 5]], np.int32)
    found, expected = (
        model.apply({"params": p}, tokens, return_hidden_states=True)
        for model, p in ((model, params), (official, host))
    )
    assert off(np.asarray(found.hidden_states), np.asarray(expected.hidden_states)) < 2e-5
    assert off(np.asarray(found.logits), np.asarray(expected.logits)) < 2e-5


@all_variants
def test_parameters(variant, mesh):
    """init makes the official tree; heads and hidden units are split, KV heads where there are
    enough, and the vocabulary."""
    model = tensor_parallel(gemma_models.official(variant), mesh)
    assert isinstance(model, type(gemma_models.official(variant)))
    own = jax.eval_shape(model.init, jax.random.key(0), sizes.tokens())["params"]
    assert own == gemma_models.shapes(variant)
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model))
    layer = specs["layer_0"]
    tp = ("tp",)
    assert specs["embedder"]["input_embedding"] == P(tp)
    assert layer["attn"]["q_einsum"]["w"] == P(tp)
    assert layer["attn"]["attn_vec_einsum"]["w"] == P(tp)
    kv = P(None, tp) if sizes.KV_HEADS[variant] == 2 else P()
    assert layer["attn"]["kv_einsum"]["w"] == kv
    dense = layer["mlp2" if variant == "26B" else "mlp"]
    assert dense == {"gating_einsum": P(None, tp), "linear": P(tp)}
    if variant == "26B":
        assert layer["mlp"]["gating_einsum"]["w"] == P(None, None, tp)
        assert layer["mlp"]["linear"]["w"] == P(None, tp)
        assert layer["mlp"]["router_logits"]["w"] == P()
    assert layer["pre_ffw_norm"]["scale"] == P()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_meshes(axis_type, cpus):
    """Batches over another axis; tensor parallelism over an axis that is not the first."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4], axis_type)
    official = gemma_models.official("31B")
    model = tensor_parallel(official, mesh, batch_axis_name="data")
    host = gemma_models.params("31B")
    expected = gemma_models.prefill(official, host)["logits"]
    params = jax.device_put(host, param_shardings(model))
    assert off(gemma_models.prefill(model, params)["logits"], expected) < 2e-5
    assert off(gemma_models.cached_logits(model, params), expected) < 2e-5
    # The data axis does not divide a batch of one.
    one = gemma_models.apply(model)(params, sizes.tokens()[:1])
    assert off(np.asarray(one.logits), expected[:1]) < 2e-5
    cache = model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8)
    assert cache["layer_0"]["k"].sharding.spec == P(("data",), None, ("tp",))
    assert cache["layer_0"]["positions"].sharding.spec == P(("data",))


def test_cache_holds_each_kv_head_once_a_rank(cpus):
    mesh = make_mesh((4,), ("tp",), cpus[:4])
    model = tensor_parallel(gemma_models.official("31B"), mesh)
    cache = model.init_cache(batch_size=1, dtype=jnp.bfloat16, cache_length=8)
    assert [cache[f"layer_{i}"]["v"].shape for i in range(2)] == [
        (1, 8, 4, sizes.HEAD_DIM),
        (1, 8, 4, sizes.GLOBAL_HEAD_DIM),
    ]


def test_checkpoint(mesh, tmp_path):
    """Official parameters, restored by the official function, never on one device alone."""
    host = gemma_models.params("Gemma3")
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", host)
    model = tensor_parallel(gemma_models.official("Gemma3"), mesh)
    wanted = gemma_models.structs(gemma_models.shapes("Gemma3"), param_shardings(model))
    params = ckpts.load_params(tmp_path / "params", params=wanted, donate=False)
    model.apply({"params": params}, sizes.tokens())  # which checks how they lie
    jax.tree.map(np.testing.assert_array_equal, params, host)
    lazily = functools.partial(param_shardings, model)
    again = ckpts.load_params(tmp_path / "params", sharding=lazily)
    jax.tree.map(np.testing.assert_array_equal, again, host)
    assert jax.tree.map(lambda a: a.sharding, again) == param_shardings(model)


def test_parameter_trees(mesh):
    """A checkpoint may hold more than the text model; a tree of another form is refused."""
    model = tensor_parallel(gemma_models.official("31B"), mesh)
    host = gemma_models.params("31B")
    complete = host | {"vision_encoder": {"entry": {"kernel": np.ones((2, 2), np.float32)}}}
    placed = jax.device_put(complete, param_shardings(model, complete))
    assert placed["vision_encoder"]["entry"]["kernel"].sharding.spec == P()
    model.apply({"params": placed}, sizes.tokens())
    flat = {"transformer/layer_0/attn/q_einsum/w": np.ones(1)}
    for wrong in (flat, {"params": host}, {}):
        with pytest.raises(ValueError, match=r"params must be the tree that .*unflatten_dict"):
            param_shardings(model, wrong)


def test_unknown_model(mesh):
    with pytest.raises(TypeError, match=r"official Gemma 2, 3 or 4 Transformer.*got builtins.dict"):
        tensor_parallel(cast(Any, {}), mesh)
    with pytest.raises(TypeError, match=r"official Gemma 2, 3 or 4 Transformer.*got .*Gemma3n_E2B"):
        tensor_parallel(gemma3n.Gemma3n_E2B(), mesh)
    model = tensor_parallel(gemma_models.official("31B"), mesh)
    with pytest.raises(TypeError, match="tensor parallel already"):
        tensor_parallel(model, mesh)
    with pytest.raises(TypeError, match="must come from tensor_parallel"):
        param_shardings(gemma_models.official("31B"))


def test_missing_axis(mesh):
    with pytest.raises(ValueError, match=r"axes of the mesh.*got 'model'"):
        tensor_parallel(gemma_models.official("31B"), mesh, "model")
    with pytest.raises(ValueError, match=r"batch_axis_name must name .*got 'dp'"):
        tensor_parallel(gemma_models.official("31B"), mesh, batch_axis_name="dp")
    with pytest.raises(ValueError, match="must not share axes"):
        tensor_parallel(gemma_models.official("31B"), mesh, batch_axis_name="tp")


@pytest.mark.parametrize("wrong", [None, "tp", jax.devices])
def test_no_mesh(wrong):
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh, such as .*, got "):
        tensor_parallel(gemma_models.official("31B"), wrong)


def test_missing_layer():
    model, params = sharded(gemma_models.official("31B"), gemma_models.params("31B", 1))
    with pytest.raises(ValueError, match=r"hold the 2 layers .*got none for layer_1; is the check"):
        model.apply({"params": params}, sizes.tokens())


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("31B", {}, r"3 ranks .*num_heads=4 must be divisible by it; hidden_dim=128 .*\[1, 2, 4\]"),
        (
            "31B",
            {"num_heads": 12, "hidden_dim": 96},
            r": num_kv_heads=2 must .* or divide it\. ",
        ),
        ("E2B", {"num_heads": 6, "hidden_dim": 96}, r"override_kv_shared_ffw_hidden=256"),
        ("26B", {"num_heads": 6, "num_kv_heads": 3}, r": moe_dense_hidden_dim=128.*expert_dim=32"),
        ("Gemma3", {"num_heads": 6}, r": hidden_dim=128 must be divisible by it\. .*\[1, 2\]"),
    ],
)
def test_indivisible(variant, changes, message, cpus):
    """The error says what does not fit, and what would."""
    mesh = make_mesh((3,), ("tp",), cpus[:3])
    model = gemma_models.official(variant, **changes)
    with pytest.raises(ValueError, match=message):
        tensor_parallel(model, mesh)


def test_no_post_norms(mesh):
    model = gemma_models.official("Gemma3", use_post_attn_norm=False)
    with pytest.raises(ValueError, match="no norms after attention and feed-forward"):
        tensor_parallel(model, mesh)


def test_pickle(mesh, monkeypatch):
    """By the official class and the devices' ids, since neither class nor devices pickle."""
    model = tensor_parallel(gemma_models.official("31B"), mesh, implementation="xla")
    for module in (pickle, cloudpickle):
        again = module.loads(module.dumps(model))
        assert again == model
        assert hash(again) == hash(model)
        assert again.mesh is model.mesh
    pickled = pickle.dumps(model)
    monkeypatch.setattr(jax, "devices", lambda platform: mesh.devices[:1])
    with pytest.raises(
        ValueError, match=r"this process lacks \[\('cpu', 1\)\]; pickle the official"
    ):
        pickle.loads(pickled)


def test_captured_intermediates(mesh):
    """A warning names what is missing: kauldron's trainer asks for them in every step."""
    model = tensor_parallel(gemma_models.official("31B"), mesh)
    params = gemma_models.shapes("31B")

    def apply(params):
        return model.apply({"params": params}, sizes.tokens(), capture_intermediates=True)

    with pytest.warns(UserWarning, match="capture_intermediates gets only the results of modules"):
        _, state = jax.eval_shape(apply, params)
    assert "layer_0" not in state["intermediates"]


def test_parameters_that_lie_otherwise(mesh):
    model = tensor_parallel(gemma_models.official("31B"), mesh)
    params = jax.device_put(gemma_models.params("31B"), mesh.devices[0])
    with pytest.raises(ValueError, match=r"parameter \S+ must lie as .*param_shardings"):
        model.apply({"params": params}, sizes.tokens())


def test_official_cache_with_too_few_heads():
    model, params = sharded(gemma_models.official("E2B"), gemma_models.params("E2B"))
    cache = model.config.init_cache(batch_size=2, dtype=jnp.float32, cache_length=16)
    mask = np.ones((2, sizes.TOKENS, 16), bool)
    with pytest.raises(ValueError, match=r"layer_0 of the cache has 1 KV heads.*init_cache"):
        model.apply({"params": params}, sizes.tokens(), cache=cache, attention_mask=mask)
