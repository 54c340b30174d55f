"""Embedding lookups in tables that ranks hold in parts, against lookups in whole ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from helpers.runners import make_mesh
from jax_gemma_arf._src import vocabulary

VOCABULARY, ROW = 40, (3, 5)
# Of every rank, the first and last of a part, from the end, and out of range.
IDS = np.array([[0, 9, 10, 19, 39, 20], [-1, -40, -41, 40, 1000, 27]])


@pytest.fixture(params=["gathered", "reduced"])
def collective(request, monkeypatch):
    """The operation that completes a lookup."""
    if request.param == "reduced":
        monkeypatch.setattr(vocabulary, "GATHER_MAX_BYTES", 0)
    return {"gathered": "all_gather", "reduced": "all_reduce"}[request.param]


@pytest.fixture
def table():
    return jax.random.normal(jax.random.key(0), (VOCABULARY, *ROW)).astype(jnp.bfloat16)


def whole(table):
    ids = np.clip(np.where(IDS < 0, IDS + VOCABULARY, IDS), 0, VOCABULARY - 1)
    return table[ids]


def split(sizes, names, cpus):
    mesh = make_mesh(sizes, names, cpus[: np.prod(sizes)])
    find = functools.partial(vocabulary.lookup, axis_name=names)
    find = jax.shard_map(find, mesh=mesh, in_specs=(P(names), P()), out_specs=P())
    return jax.jit(lambda table: find(table, jnp.asarray(IDS)))


@pytest.mark.parametrize(
    ("sizes", "names"), [((2,), ("tp",)), ((4,), ("tp",)), ((2, 2), ("x", "y"))], ids=str
)
def test_lookup(table, cpus, collective, sizes, names):
    find = split(sizes, names, cpus)
    np.testing.assert_array_equal(find(table), whole(table))
    text = find.lower(table).as_text()
    other = {"all_gather": "all_reduce", "all_reduce": "all_gather"}[collective]
    assert f"stablehlo.{collective}" in text
    assert f"stablehlo.{other}" not in text
    assert ("stablehlo.partition_id" in text) == (collective == "all_reduce")


@pytest.mark.usefixtures("collective")
def test_derivative(table, cpus):
    """An id that comes twice, as -1 and 39 do, adds up."""
    weights = jnp.arange(IDS.size * np.prod(ROW), dtype=jnp.float32).reshape(*IDS.shape, *ROW) % 8

    def gradient(find):
        return jax.grad(lambda table: jnp.sum(find(table).astype(jnp.float32) * weights))(table)

    np.testing.assert_array_equal(gradient(split((4,), ("tp",), cpus)), gradient(whole))
