"""Times a Gemma of google-tunix, as it is and with fused tails, in training and in sampling.

Three implementations run the same parameters on one mesh of 1 x N devices ("fsdp" x "tp"):

- "official": the unmodified model, whose collectives the compiler places.
- "psum": jax_gemma_arf.integrations.tunix.tensor_parallel(implementation="xla").
- "fused": tensor_parallel(implementation="cuda").

Phases: "decode" is the loop of Tunix's Sampler, at temperature 1 from all tokens, behind a prompt
of random keys and values. "training" is the step of Tunix's PeftTrainer: its loss, the gradients of
all parameters and an update by Adam.

A row has microseconds a step (wall time); the implementations are timed in turn. Sampled tokens,
and losses and gradient norms of the first steps, are compared with the official model. On a CPU,
where times mean nothing, a cut-down model tries the script out without "fused".

This file is not called tunix.py, since that name would hide the package.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import model
import numpy as np
import report

#: Module of tunix.models, class of the model, and constructor of its configuration. Three copies of
#: each, with optimizers, fit two GPUs of 80 GB.
MODELS = {
    "Gemma3_4B": ("gemma3", "Gemma3", "gemma3_4b_pt"),
    "Gemma4_E2B": ("gemma4", "Gemma4", "gemma4_e2b"),
}
#: Steps of training that are compared, and the greatest relative differences of their losses and
#: gradient norms, in bfloat16.
COMPARED_STEPS, LOSS_BOUND, NORM_BOUND = 3, 2**-8, 2**-5
#: Greatest share of different tokens among those that follow the same tokens. Logits of bfloat16
#: models, 2 to 4 % apart, give 0 to 6 %; a scale_offset that is off by 0.5 gives 44 % and more.
TOKEN_BOUND = 2**-2


class Training:
    """Steps of Tunix's trainer, on one batch. Overwrites the parameters of the model."""

    def __init__(self, model: Any, tokens: jax.Array, mesh: jax.sharding.Mesh):
        import optax  # noqa: PLC0415
        from flax import nnx  # noqa: PLC0415
        from tunix.sft import peft_trainer  # noqa: PLC0415

        config = peft_trainer.TrainingConfig(eval_every_n_steps=1000)
        trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-4), config)
        train = trainer.create_train_step_fn()
        graph, state = nnx.split((trainer.model, trainer.optimizer))
        shardings = jax.tree.map(
            lambda spec: jax.NamedSharding(mesh, spec), nnx.get_partition_spec(state)
        )
        self.state = jax.device_put(state, shardings)
        batch, length = tokens.shape
        self.inputs = {
            "input_tokens": tokens,
            "input_mask": jnp.ones((batch, length), bool),
            "positions": jnp.tile(jnp.arange(length), (batch, 1)),
            "attention_mask": jnp.tile(jnp.tri(length, dtype=bool), (batch, 1, 1)),
        }

        def step(state, inputs):
            modules = nnx.merge(graph, state)
            loss, _, norm = train(*modules, inputs)
            return (loss, norm), nnx.state(modules)

        self.jitted = jax.jit(step, donate_argnums=0, out_shardings=(None, shardings))
        self.program: Any = None

    def operands(self) -> tuple[Any, Any]:
        """Returns the arguments of a step."""
        return self.state, self.inputs

    def __call__(self) -> Any:
        """Runs a step; returns the loss and the gradient norm."""
        out, self.state = self.program(*self.operands())
        return out

    def result(self) -> np.ndarray:
        """Runs the first steps; returns their losses and gradient norms, [2, steps]."""
        return np.array([jax.device_get(self()) for _ in range(COMPARED_STEPS)], np.float32).T

    @staticmethod
    def compare(found: np.ndarray, want: np.ndarray) -> dict[str, Any]:
        """Fields of a row: the result, how far it is off, and whether that is little."""
        loss, norm = np.max(np.abs(found / want - 1), axis=1).tolist()
        return {
            "losses": found[0].tolist(),
            "gradient_norms": found[1].tolist(),
            "loss_error": loss,
            "norm_error": norm,
            "matches": loss <= LOSS_BOUND and norm <= NORM_BOUND,
        }


class Sampling:
    """The loop of Tunix's sampler, again and again behind one prompt."""

    def __init__(self, model: Any, tokens: jax.Array, cache: Any, steps: int):
        from tunix.generate import sampler  # noqa: PLC0415

        config, length = model.config, tokens.shape[1]
        sizes = length + steps, config.num_layers, config.num_kv_heads, config.head_dim
        loop: Any = sampler.Sampler(model, Tokenizer, sampler.CacheConfig(*sizes))
        loop.eos_ids = jnp.array([Tokenizer.eos_id()])
        _, self.params = loop.model_def_and_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Gemma 3 has no init_cache
            state = loop.init_sample_state(
                tokens,
                total_sampling_steps=length + steps - 1,
                include_logits=False,
                forbidden_token_ids=None,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                seed=jax.random.PRNGKey(2),
                beam_size=None,
            )
        self.state = dataclasses.replace(state, cache=cache(state.cache))

        def decode(params, state):
            return loop._decode_fn(params, state).token_buffer[:, length:]

        self.jitted = jax.jit(decode)
        self.program: Any = None

    def operands(self) -> tuple[Any, Any]:
        """Returns the arguments of the loop."""
        return self.params, self.state

    def __call__(self) -> jax.Array:
        """Runs the loop; returns the sampled tokens."""
        return self.program(*self.operands())

    def result(self) -> np.ndarray:
        """Samples once; returns the tokens, [B, steps - 1]."""
        return np.asarray(self())

    @staticmethod
    def compare(found: np.ndarray, want: np.ndarray) -> dict[str, Any]:
        """Fields of a row: the share of different tokens, and whether that is small.

        Of each sequence the tokens up to the first difference count: those behind it follow
        others.
        """
        differ = found != want
        differing = differ.any(axis=1)
        counted = np.where(differing, differ.argmax(axis=1) + 1, differ.shape[1])
        share = float(differing.sum() / counted.sum())
        return {"token_error": share, "matches": share <= TOKEN_BOUND}


class Tokenizer:
    """Stand-in for a tokenizer: prompts are tokens already, and none ends them."""

    encode = decode = bos_id = staticmethod(lambda *_: None)
    pad_id = staticmethod(lambda: 0)
    eos_id = staticmethod(lambda: -1)


class Bench(common.Bench):
    """A model on the devices there are."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments, "single")
        self.small = self.mode == "cpu"
        self.layers = arguments.layers or (4 if self.small or arguments.quick else 0)
        self.length = 32 if self.small else arguments.length
        self.steps = 16 if self.small else arguments.steps
        self.mesh = jax.make_mesh(
            (1, self.ranks),
            ("fsdp", "tp"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=self.devices,
        )
        self.implementations = {"official": None, "psum": "xla"}
        if self.mode == "mesh":
            self.implementations["fused"] = "cuda"
        module, self.kind, self.size = MODELS[arguments.model]
        self.module = importlib.import_module(f"tunix.models.{module}.model")

    def config(self, *, is_sampling: bool) -> Any:
        """Tunix's configuration, in bfloat16. Norms are replicated: else they are gathered."""
        sharding = self.module.ShardingConfig.get_default_sharding(is_sampling)
        sharding = dataclasses.replace(sharding, rms_norm_weight=(None,))
        config = getattr(self.module.ModelConfig, self.size)(sharding)
        changes: dict[str, Any] = {"param_dtype": jnp.bfloat16}
        if self.kind == "Gemma4":
            changes["dtype"] = jnp.bfloat16
        if self.layers:
            changes["num_layers"] = self.layers
            if self.kind == "Gemma4":  # the last half shares the keys and values of these two
                kinds = self.module.AttentionType
                changes["attention_pattern"] = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
                changes["frac_shared_layers"] = 0.5
        if self.small:
            changes |= {"num_embed": 512, "embed_dim": 256, "hidden_dim": 256, "head_dim": 32}
            changes |= {"num_heads": 4, "sliding_window_size": 16}
            if self.kind == "Gemma4":
                changes |= {"global_key_size": 64, "per_layer_input_dim": 16}
                changes |= {"override_kv_shared_ffw_hidden": 512}
        return dataclasses.replace(config, **changes)

    def abstract(self, *, is_sampling: bool) -> tuple[Any, Any]:
        """The graph of the unmodified model, and its state without arrays."""
        from flax import nnx  # noqa: PLC0415

        config = self.config(is_sampling=is_sampling)
        kind = getattr(self.module, self.kind)
        return nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))

    def model(self, name: str, arrays: Sequence[jax.Array], *, is_sampling: bool) -> Any:
        """The model of an implementation with these parameters."""
        from flax import nnx  # noqa: PLC0415

        from jax_gemma_arf.integrations import tunix  # noqa: PLC0415

        graph, state = self.abstract(is_sampling=is_sampling)
        model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), arrays))
        implementation = self.implementations[name]
        if implementation is None:
            return model
        return tunix.tensor_parallel(model, self.mesh, implementation=implementation)

    def parameters(self) -> list[jax.Array]:
        """Random ones, made where they lie, in the order of the leaves of a state.

        Each layer adds little to its residual, as in model.py. The deviation of the logits is 2,
        and the last token has no great part in them, or it would be sampled again and again.
        """
        from flax import nnx  # noqa: PLC0415

        _, state = self.abstract(is_sampling=False)
        width = self.config(is_sampling=False).embed_dim ** -0.5
        unit = 1 if self.kind == "Gemma3" else 0  # Gemma 3 stores w for a scale of 1 + w
        draws = {  # mean and deviation
            "skip_scale": (0.9, 2**-6),
            "final_norm": (32 - unit, 2**-4),
            "scale": (0.25 - unit, 2**-4),
            "input_embedding": (0, width / 16),
        }

        def drawn(path):
            keys = [getattr(entry, "key", None) for entry in path]
            return next((draw for key, draw in draws.items() if key in keys), (0, width))

        specs = jax.tree.leaves(nnx.get_partition_spec(state))
        leaves = jax.tree.leaves_with_path(state)
        return [
            self.random(leaf.shape, leaf.dtype, spec, *drawn(path))(jnp.uint32(i))
            for i, ((path, leaf), spec) in enumerate(zip(leaves, specs))
        ]

    @functools.cache  # noqa: B019
    def random(self, shape, dtype, spec, mean, deviation) -> Callable[[jax.Array], jax.Array]:
        """A function from a seed to a random array on the mesh."""

        def make(seed):
            return (mean + deviation * model.noise(shape, seed)).astype(dtype)

        return jax.jit(make, out_shardings=jax.NamedSharding(self.mesh, spec))

    def cache(self, empty: Any) -> Any:
        """Random keys and values of the prompt, without its last token."""

        def fill(i, array):
            if array.ndim != 4:
                return jnp.full_like(array, self.length - 1)  # end_index
            heads = None if array.shape[2] % self.mesh.size else "tp"
            spec = jax.P("fsdp", None, heads)
            return self.random(array.shape, array.dtype, spec, 0, 1)(jnp.uint32(i))

        leaves, tree = jax.tree.flatten(empty)
        return tree.unflatten(fill(i, leaf) for i, leaf in enumerate(leaves))

    def tokens(self, batch: int) -> jax.Array:
        """Random ones, [B, L]."""
        vocabulary = self.config(is_sampling=True).num_embed
        tokens = jax.random.randint(jax.random.key(1), (batch, self.length), 2, vocabulary)
        return jax.device_put(tokens, jax.NamedSharding(self.mesh, jax.P("fsdp")))

    def sampling(self, name: str, arrays: Sequence[jax.Array]) -> Sampling:
        """A run of the phase "decode"."""
        model = self.model(name, arrays, is_sampling=True)
        return Sampling(model, self.tokens(self.arguments.batch), self.cache, self.steps)

    def training(self, name: str, arrays: Sequence[jax.Array]) -> Training:
        """A run of the phase "training"."""
        copies = [jnp.copy(array) for array in arrays]
        model = self.model(name, copies, is_sampling=False)
        return Training(model, self.tokens(self.arguments.train_batch), self.mesh)

    def facts(self) -> dict[str, Any]:
        config = self.config(is_sampling=True)
        return {
            "prompt": self.length,
            "steps": self.steps,
            "timings": 2 * len(self.implementations),
            self.arguments.model: {"layers": config.num_layers, "hidden": config.embed_dim},
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the decode, then of the training, whose optimizers take the memory."""
        arrays = self.parameters()
        repeats = 2 if self.arguments.quick else self.arguments.repeats
        clock = common.Clock(self.mesh, repeats, runs=2)
        yield from self.phase("decode", self.sampling, arrays, clock)
        yield from self.phase("training", self.training, arrays, clock)

    def phase(self, phase, make, arrays, clock) -> Iterator[dict[str, Any]]:
        """Rows of all implementations: compiled at once, compared, and timed in turn."""
        decodes = phase == "decode"
        batch = self.arguments.batch if decodes else self.arguments.train_batch
        shared = {
            "model": self.arguments.model,
            "phase": phase,
            "batch": batch,
            "tokens": batch * (1 if decodes else self.length),
            "flag_set": self.arguments.flag_set,
            "ranks": self.mesh.size,
        }
        rows = {name: shared | {"implementation": name} for name in self.implementations}
        runs: dict[str, Any] = {}
        with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
            futures = {}
            for name in rows:
                run = runs[name] = make(name, arrays)
                lower = functools.partial(run.jitted.lower, *run.operands())
                with self.mesh:
                    futures[name] = common.start(pool, lower)
                yield progress(f"{phase}: {name} is lowered")
            # Compilers at work, which try out kernels on the GPUs, would disturb what runs.
            concurrent.futures.wait(futures.values())
            yield progress(f"{phase}: all are compiled")
        results = {}
        for name, future in futures.items():
            try:
                runs[name].program = future.result()
                results[name] = runs[name].result()
            except Exception as error:
                rows[name] |= common.failure(error)
                del runs[name]
        if "official" in runs:
            for name, run in runs.items():
                rows[name] |= run.compare(results[name], results["official"])
        yield progress(f"{phase}: all are compared")
        samples = clock.in_turn([*runs.values()], self.steps if decodes else 1)
        for name, taken in zip(runs, samples):
            rows[name]["step_us"] = taken
        yield from rows.values()


def progress(text: str) -> dict[str, Any]:
    """A line for the terminal, with the seconds that this process has run."""
    return {"progress": f"{time.monotonic() - STARTED:4.0f} s: {text}"}


STARTED = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a Gemma of google-tunix.")
    common.add_arguments(parser, child_seconds=240)
    parser.set_defaults(repeats=7)
    positive = common.positive_integer
    parser.add_argument("--model", choices=MODELS, default="Gemma3_4B")
    parser.add_argument(
        "--layers", type=int, default=0, help="number of layers to keep, a multiple of 4; 0: all"
    )
    parser.add_argument("--batch", type=positive, default=8, help="sequences that are sampled")
    parser.add_argument("--train-batch", type=positive, default=1, help="sequences of training")
    parser.add_argument(
        "--length", type=positive, default=1024, help="tokens of a prompt, or of training"
    )
    parser.add_argument("--steps", type=positive, default=64, help="tokens of each timed decode")
    arguments = parser.parse_args()
    if arguments.layers % 4:
        parser.error(f"--layers must be a multiple of 4, got {arguments.layers}")
    if importlib.util.find_spec("tunix") is None:
        parser.error("needs google-tunix: pip install '.[bench,tunix]'")
    if common.in_child(arguments):
        common.work(Bench, arguments)
        return
    # Nothing but the package's small workspaces lies outside JAX's pool.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    label = "{model}, {implementation}, {phase}, batch {batch}"
    report.finish("tunix", common.run_children(["A"], arguments, label), arguments.out)


if __name__ == "__main__":
    main()
