"""google-tunix's models with fused tails, against the same models as they were, in float32."""

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jax_gemma_arf as jga
from helpers.runners import make_mesh
from jax_gemma_arf._src import lowering

pytest.importorskip("tunix", reason="needs google-tunix: the extra tunix of pyproject.toml")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import qwix
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma4 import model as gemma4
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    from jax_gemma_arf.integrations import tunix

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("compiled_in_a_hurry"),
]

LOCAL, GLOBAL = gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL
SIZES = {
    "num_layers": 2,
    "num_embed": 64,
    "embed_dim": 256,
    "hidden_dim": 64,
    "num_heads": 8,
    "head_dim": 16,
    "num_kv_heads": 4,
    "sliding_window_size": 4,
}
GEMMA4 = SIZES | {"global_key_size": 32, "attention_pattern": (LOCAL, GLOBAL)}
SMALL_EXPERTS = {"num_experts": 4, "expert_dim": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "gemma3": functools.partial(gemma3.ModelConfig, **SIZES | {"param_dtype": jnp.float32}),
    "31b": functools.partial(gemma4.ModelConfig, **GEMMA4, k_eq_v_global=True),
    "e2b": functools.partial(
        gemma4.ModelConfig,
        **GEMMA4 | {"num_layers": 3, "frac_shared_layers": 0.33},
        per_layer_input_dim=16,
        override_kv_shared_ffw_hidden=128,
    ),
    "26b_a4b": functools.partial(gemma4.ModelConfig, **GEMMA4, **SMALL_EXPERTS, enable_moe=True),
}
BATCH, LENGTH = 4, 8


def auto_mesh(cpus, fsdp, tp):
    return make_mesh((fsdp, tp), ("fsdp", "tp"), cpus[: fsdp * tp])


def make(name, mesh, *, is_sampling=False, **options):
    """A model with random weights, on the mesh as Tunix shards them."""
    module: Any = gemma3 if name == "gemma3" else gemma4
    shd_config = module.ShardingConfig.get_default_sharding(is_sampling)
    kind = module.Gemma3 if name == "gemma3" else module.Gemma4
    if isinstance(options.get("remat_config"), str):
        options["remat_config"] = module.RematConfig[options["remat_config"]]
    with jax.default_device(mesh.devices.flat[0]):
        model = kind(CONFIGS[name](shd_config=shd_config, **options), rngs=nnx.Rngs(0))
    state = nnx.state(model)
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = 0.05 * rng.standard_normal(leaf.shape)
        return np.asarray(values + (leaf.ndim == 1 and name != "gemma3"), leaf.dtype)

    def put(leaf, spec):
        return jax.device_put(draw(leaf), jax.NamedSharding(mesh, spec))

    nnx.update(model, jax.tree.map(put, state, nnx.get_partition_spec(state)))
    return model


def batch():
    tokens = np.random.default_rng(1).integers(1, 64, (BATCH, LENGTH))
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    return {
        "input_tokens": jnp.asarray(tokens, jnp.int32),
        "input_mask": jnp.ones((BATCH, LENGTH), bool),
        "positions": jnp.tile(jnp.arange(LENGTH), (BATCH, 1)),
        "attention_mask": jnp.tile(causal, (BATCH, 1, 1)),
    }


def with_lora(model, mesh, weights=None):
    provider = qwix.LoraProvider(
        module_path=".*(attn_vec_einsum|q_einsum|down_proj|up_proj)",
        rank=2,
        alpha=2.0,
        lora_b_initializer=jax.nn.initializers.normal(0.05),
        **({"weight_qtype": weights} if weights else {}),
    )
    inputs: dict[str, Any] = {name: value[:2] for name, value in batch().items()}
    inputs.pop("input_mask")
    tokens = inputs.pop("input_tokens")
    with mesh:
        return qwix.apply_lora_to_model(
            model, provider, tokens, cache=None, **inputs, rngs=nnx.Rngs(1)
        )


def train(model, mesh):
    """Three steps of Tunix's trainer: losses, norms of gradients, trained parameters."""
    config = TrainingConfig(eval_every_n_steps=100, max_steps=3)
    with mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = PeftTrainer(model, optax.sgd(0.1), config)
        trainer = trainer.with_gen_model_input_fn(lambda inputs: inputs)
        step, _ = trainer.jit_train_and_eval_step()
        results = [step(batch()) for _ in range(3)]
        trainer.close()
    kind = nnx.LoRAParam if trainer._lora_enabled else nnx.Param
    losses, _, norms = zip(*results)
    return np.stack(losses), np.stack(norms), nnx.to_pure_dict(nnx.state(model, kind))


@functools.cache
def trained_as_it_was(name, weights=None, lora=False):
    """Trains the unmodified model on one device."""
    mesh = auto_mesh(jax.devices("cpu"), 1, 1)
    model = make(name, mesh)
    results = train(with_lora(model, mesh, weights) if lora else model, mesh)
    return jax.tree.map(np.asarray, results)


def assert_trained_alike(model, mesh, want):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    results = train(model, mesh)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(results) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(want)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    moved = [not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (before, after)))]
    assert any(moved)


@pytest.mark.parametrize(
    ("name", "sizes", "remat"),
    [
        ("gemma3", (1, 2), "NONE"),
        ("gemma3", (2, 2), "BLOCK"),
        ("gemma3", (1, 4), "DECODER"),
        ("31b", (2, 2), "NONE"),
        ("e2b", (2, 2), "BLOCK"),
        ("e2b", (1, 4), "NONE"),
        ("26b_a4b", (2, 2), "DECODER"),
    ],
    ids=str,
)
def test_training(cpus, name, sizes, remat):
    mesh = auto_mesh(cpus, *sizes)
    model = tunix.tensor_parallel(make(name, mesh, remat_config=remat), mesh)
    assert_trained_alike(model, mesh, trained_as_it_was(name))


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("lora_first", [True, False])
def test_lora(cpus, lora_first, weights):
    """LoRA and QLoRA, applied before or after: the two projections have their adapters."""
    mesh = auto_mesh(cpus, 2, 2)
    model = make("gemma3", mesh)
    if lora_first:
        model = tunix.tensor_parallel(with_lora(model, mesh, weights), mesh)
    else:
        model = with_lora(tunix.tensor_parallel(model, mesh), mesh, weights)
    adapters = [
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    ]
    assert sum("attn_vec_einsum" in path or "down_proj" in path for path in adapters) == 8
    assert_trained_alike(model, mesh, trained_as_it_was("gemma3", weights, lora=True))


class Letters:
    """A tokenizer, for Tunix's sampler."""

    def encode(self, text):
        return [ord(letter) % 60 + 4 for letter in text]

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    def bos_id(self):
        return 2

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0


def sample(model, mesh) -> Any:
    cache = CacheConfig(cache_size=16, num_layers=2, num_kv_heads=4, head_dim=16)
    with mesh:
        sampler = Sampler(model, Letters(), cache)
        options = {"temperature": 1.0, "top_p": 0.95, "seed": 0, "return_logits": True}
        return sampler(["ab", "xyz"], max_generation_steps=8, **options)


@pytest.mark.parametrize("name", ["gemma3", "e2b"])
def test_sampling(cpus, name):
    """The same tokens, with caches, from the same sampler."""
    mesh = auto_mesh(cpus, 1, 2)
    plain = sample(make(name, mesh, is_sampling=True), mesh)
    fused = sample(tunix.tensor_parallel(make(name, mesh, is_sampling=True), mesh), mesh)
    assert fused.text == plain.text
    assert len(set(plain.text[0].split())) > 1
    for one, other in zip(fused.logits, plain.logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def forward(model):
    graph, state = nnx.split(model)

    def call(state, inputs):
        arguments = inputs["positions"], None, inputs["attention_mask"]
        return nnx.merge(graph, state)(inputs["input_tokens"], *arguments)[0]

    return jax.jit(call), state


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("name", CONFIGS)
def test_calls(cpus, name):
    """Two launches a layer, three with per-layer inputs; of activations the tails alone, and the
    lookup of the embedding, are reduced."""
    mesh = auto_mesh(cpus, 1, 2)
    fused = tunix.tensor_parallel(make(name, mesh), mesh)
    with mesh:
        call, state = forward(fused)
        traced = call.trace(state, batch())
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        tails = len(fused.layers) * (3 if name == "e2b" else 2)
        assert text.count(f"@{lowering.TARGET_NAME}") == tails
        assert not re.search(r"all_reduce|all_gather|reduce_scatter", text)
        if name not in ("gemma3", "e2b"):
            return
        compiled = traced.lower().compile()
    # Besides the tails: the lookup of the embedding, and what reads the final norm.
    rows = (BATCH, LENGTH, SIZES["embed_dim"])
    found = [c.kind for c in jga.audit(compiled) for shape in c.shapes if shape == rows]
    assert found.count("all-reduce") == tails + 1, found
    assert found.count("all-gather") <= 2, found


HALF = {"param_dtype": jnp.bfloat16}
DTYPES = [("gemma3", HALF)]
for other in ("31b", "e2b", "26b_a4b"):
    DTYPES += [(other, {"dtype": jnp.bfloat16}), (other, HALF | {"dtype": jnp.bfloat16})]


@pytest.mark.parametrize(("name", "dtypes"), DTYPES)
def test_dtypes(cpus, name, dtypes):
    """In bfloat16, also with parameters in float32: logits of the same type."""
    mesh = auto_mesh(cpus, 1, 2)

    def logits(modify):
        model = modify(make(name, mesh, **dtypes))
        call, state = forward(model)
        return jax.eval_shape(call, state, batch())

    assert logits(lambda model: tunix.tensor_parallel(model, mesh)) == logits(lambda model: model)


def test_rejected(cpus, monkeypatch):
    mesh = auto_mesh(cpus, 1, 2)
    model = make("gemma3", mesh)
    with pytest.raises(TypeError, match=r"must be a Gemma3 or Gemma4 of tunix.models, got flax"):
        tunix.tensor_parallel(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), mesh)
    with pytest.raises(ValueError, match="axis_name must name one or several"):
        tunix.tensor_parallel(model, mesh, axis_name="model")
    explicit = make_mesh((1, 2), ("fsdp", "tp"), cpus[:2], AxisType.Explicit)
    with pytest.raises(ValueError, match=r"must have Auto axes.*\(AxisType.Auto,\) \* 2"):
        tunix.tensor_parallel(model, explicit)
    monkeypatch.setattr(tunix.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(ImportError, match=r"needs google-tunix 0\.1\.7, found 0\.2\.0: pip"):
        tunix._check_version()


def test_projections_rejected(cpus):
    """Where the model runs: a projection that is not sharded, and random state."""
    mesh = auto_mesh(cpus, 1, 2)
    fused = tunix.tensor_parallel(make("gemma3", mesh), mesh, axis_name="fsdp")
    call, state = forward(fused)
    jax.eval_shape(call, state, batch())
    fused.layers[0].mlp.down_proj.kernel.set_metadata(out_sharding=("tp", None))
    call, state = forward(fused)
    with pytest.raises(ValueError, match="must be sharded over axis_name 'fsdp', got the specs"):
        jax.eval_shape(call, state, batch())
    fused.layers[0].attn.attn_vec_einsum.dropout = nnx.Rngs(0)
    call, state = forward(fused)
    with pytest.raises(ValueError, match="must have no random state, such as LoRA's dropout has"):
        jax.eval_shape(call, state, batch())
