"""A tensor parallel model in kauldron's trainer, as docs/adopting.md says."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from helpers.gemma_models import kd
from helpers.runners import make_mesh
from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches(kd.data.Pipeline):
    """One batch, repeated without end."""

    def __iter__(self) -> Any:
        tokens = sizes.tokens()
        while True:
            yield {"tokens": tokens, "target": np.roll(tokens, -1, axis=1)[..., None]}

    def __len__(self):
        return 1

    @functools.cached_property
    def element_spec(self):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), next(iter(self)))


@pytest.mark.usefixtures("compiled_in_a_hurry")
@pytest.mark.filterwarnings("ignore:capture_intermediates gets only:UserWarning")
def test_kauldron(cpus, tmp_path):
    """Parameters stay where the recipe puts them, over data and tensor axes, and are trained."""
    mesh = make_mesh((2, 4), ("data", "tp"), cpus)
    official = gemma_models.official("Gemma3", 1).clone(tokens="batch.tokens")
    model = tensor_parallel(official, mesh, batch_axis_name="data")
    shardings = param_shardings(model)
    trainer = kd.train.Trainer(
        seed=0,
        workdir=tmp_path,
        train_ds=Batches(batch_size=sizes.BATCH),
        model=model,
        train_losses={
            "loss": kd.losses.SoftmaxCrossEntropyWithIntLabels(
                logits="preds.logits", labels="batch.target"
            )
        },
        optimizer=optax.sgd(1e-2),
        num_train_steps=1,
        sharding=kd.sharding.ShardingStrategy(
            params=shardings, batch=NamedSharding(mesh, P("data"))
        ),
    )
    state = trainer.init_state()
    before = jax.tree.map(np.asarray, state.params)  # a step donates its state
    batch = kd.sharding.device_put(next(iter(trainer.train_ds)), trainer.sharding.batch)
    after = trainer.trainstep.step(state, batch)[0].params
    assert jax.tree.map(lambda a: a.sharding, after) == shardings
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)))
