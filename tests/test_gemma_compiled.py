"""Decode steps compiled for GPUs have no collective that this repository did not write, and copy no
weights.

XLA gathers a whole sharded table to look up one row of it, in programs for GPUs alone; so they are
compiled for H100s here, with JAX's CUDA plugin and no GPU (compile_gemma.py).
"""

import json
import os
from pathlib import Path

import pytest

from helpers import children
from helpers import gemma_sizes as sizes

HERE = Path(__file__).parent
PLUGIN = HERE.parent / "build" / "cuda_plugin"


@pytest.fixture(scope="module")
def programs():
    """The rows of compile_gemma.py."""
    pytest.importorskip("gemma", reason="needs google-deepmind/gemma: pip install '.[gemma]'")
    paths = [str(HERE), *([str(PLUGIN)] if PLUGIN.exists() else [])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    run = children.python(
        *("-P", "-W", "ignore", "-m", "helpers.compile_gemma", *sizes.VARIANTS),
        PYTHONPATH=os.pathsep.join(paths),
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",  # it wants cuDNN, for which nothing here asks
    )
    if "No module named 'jax_plugins" in run.stderr:
        pytest.skip("needs JAX's CUDA plugin: make test puts it into build/cuda_plugin")
    return [json.loads(line) for line in run.check().stdout.splitlines()]


@pytest.mark.timeout(400)  # the first compiles for all
@pytest.mark.parametrize("variant", sizes.VARIANTS)
def test_collectives(programs, built, variant):
    """A step gathers the rows of its lookups at once; taking the largest logit exchanges one a
    rank. Its tails are calls of TARGET_NAME, two a layer. The lengths of all caches are written by
    one kernel."""
    del built  # without the extension, the tails are all-reduces as well
    rows = [row for row in programs if row["variant"] == variant and "wide" not in row]
    *steps, official = rows
    assert len(steps) == 5
    per_layer_row = sizes.LAYERS["E2B"] * sizes.PER_LAYER_WIDTH if variant == "E2B" else 0
    for step in steps:
        row = max(sizes.WIDTH, per_layer_row)  # the larger result of the two
        expected = [
            ["all-gather", step["ranks"] * step["batch"] * row],
            ["all-gather", step["batch"] * step["ranks"]],
        ]
        assert sorted(step["collectives"]) == sorted(expected), step
        assert step["calls"] == 2 * sizes.LAYERS[variant], step
        assert step["length_kernels"] == 0, step
    # The check can fail: the official model with the same shardings gathers its table.
    largest = max(size for kind, size in official["collectives"] if kind == "all-gather")
    assert largest >= sizes.VOCAB * sizes.WIDTH


@pytest.mark.timeout(400)
def test_no_weight_is_copied(programs, built):
    """XLA of jaxlib 0.12 transposes the weights of queries, keys and values in every step, where
    they are multiplied as in the official modules."""
    del built
    wide = [row for row in programs if "wide" in row]
    assert [row["batch"] for row in wide] == [1, 2]
    of_one_head = sizes.WIDE["embed_dim"] * sizes.WIDE["head_dim"]
    for row in wide:
        gate_and_up = row["batch"] * sizes.WIDE["hidden_dim"]  # of half the units, really written
        assert gate_and_up <= row["largest_result"] < of_one_head, row
