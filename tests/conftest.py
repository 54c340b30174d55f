"""Eight virtual CPU devices, and skips that say what a test needs and what was found."""

import os
from typing import Any

import jax
import pytest

import jax_gemma_arf
from helpers.places import Place, gpu_mesh
from helpers.runners import make_mesh
from jax_gemma_arf._src import extension

jax.config.update("jax_num_cpu_devices", 8)
# Workspaces live outside JAX's memory pool, and loopback keeps the workspaces of all ranks on one
# GPU: with the pool preallocated, NCCL and the tests' child processes would find no memory left.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Ranks that wait for each other in vain shall say so, and fail, before pytest's timeout.
jax_gemma_arf.set_peer_timeout(20)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which machines with GPUs need not have
def pytest_xdist_auto_num_workers() -> int | None:
    """No processes besides this one where there is a GPU, since tests fill its memory and time
    out while they wait for it; as many as cores elsewhere."""
    return 0 if gpus() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that `-k loopback` and `-k multi_gpu` select, for `-m`."""
    for item in items:
        for marker in ("loopback", "multi_gpu"):
            if marker in item.nodeid:
                item.add_marker(marker)


def gpus() -> list[Any]:
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


@pytest.fixture
def require_gpus():
    """require_gpus(n) returns n GPUs or skips."""

    def require(count: int) -> list[Any]:
        found = gpus()
        if len(found) < count:
            pytest.skip(f"needs {count} GPUs, found {len(found)}")
        return found[:count]

    return require


@pytest.fixture(params=["loopback_2", "loopback_4", "multi_gpu_2", "multi_gpu_4"])
def where(request, built, require_gpus):
    kind, ranks = request.param.rsplit("_", 1)
    if kind == "multi_gpu":
        return Place(int(ranks), gpu_mesh(require_gpus(int(ranks))))
    require_gpus(1)
    return Place(int(ranks))


@pytest.fixture
def built():
    """The extension, or a skip that says why there is none."""
    if extension.load() is None:
        pytest.skip(f"needs the extension: {extension.why_missing()}")
    return extension.load()


@pytest.fixture
def flashinfer():
    """The extension with FlashInfer's kernels, or a skip."""
    if extension.load("flashinfer") is None:
        pytest.skip(f"needs a build with FlashInfer: {extension.why_missing('flashinfer')}")
    return extension.load("flashinfer")


@pytest.fixture
def compiled_in_a_hurry():
    """For small models, where compiling takes nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def mesh(cpus):
    """Two virtual CPUs along "tp", in Auto mode."""
    return make_mesh((2,), ("tp",), cpus[:2])


@pytest.fixture
def cpus() -> list[Any]:
    return jax.devices("cpu")
