"""FlashInfer's all-reduce kernels and the wire, as JAX calls: what bench/op.py compares with.

Built by ``make bench-rivals`` into build/rivals/, apart from the library, which does not use
FlashInfer. All partial sums are bfloat16. One process holds all ranks; ``create`` comes first.
"""

import functools
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from jax_gemma_arf.support import FLASHINFER_ONE_SHOT_MAX_BYTES

DIRECTORY = Path(__file__).parents[2] / "build" / "rivals"


@functools.cache
def load() -> ModuleType | None:
    """The extension with its targets registered, or None if it was not built."""
    found = next(DIRECTORY.glob("_rivals*.so"), None)
    if found is None:
        return None
    spec = importlib.util.spec_from_file_location("_rivals", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, stages in module.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")
    return module


def one_shot(ranks: int, message_bytes: int) -> bool:
    """FlashInfer's own rule for bfloat16."""
    return message_bytes <= FLASHINFER_ONE_SHOT_MAX_BYTES[ranks]


def create(devices: list[int], message_bytes: int) -> None:
    """Allocates, once a process, for messages up to message_bytes.

    Args:
      devices: the CUDA device of each rank; one device, repeated, is loopback.
      message_bytes: of x on one rank.
    """
    module = load()
    if module is None:
        raise RuntimeError(f"nothing built in {DIRECTORY}; run make bench-rivals")
    ranks = len(devices)
    most_one_shot = FLASHINFER_ONE_SHOT_MAX_BYTES[ranks]
    module.create(devices, min(message_bytes, most_one_shot), message_bytes)


def all_reduce(x: jax.Array, *, ranks: int) -> jax.Array:
    """FlashInfer's all-reduce alone: x, [tokens, D] or (in loopback) [N, tokens, D], summed."""
    return _call("all_reduce", x, ranks=ranks)[0]


def all_reduce_norm(
    x: jax.Array, residual: jax.Array, norm_scale: jax.Array, *, ranks: int, eps: float = 1e-6
) -> jax.Array:
    """FlashInfer's kARResidualRMSNorm: rmsnorm(psum(x) + residual) * norm_scale, x's shape.

    Gemma's norm comes before the residual add, so residual [tokens, D] must be zeros for it.
    """
    return _call("all_reduce_norm", x, residual, norm_scale, ranks=ranks, eps=eps)[0]


def wire(x: jax.Array, *, ranks: int, read: bool = False) -> jax.Array:
    """Every rank pushes the first 2 / N of x to every peer, as an all-reduce must at least.

    Returns:
      x; or, with read, what the next rank sent, in the first elements.
    """
    return _call("wire", x, ranks=ranks, read=read, input_output_aliases={0: 0})[0]


def _call(kind, x, *others, ranks, read=False, eps=0.0, **options):
    loopback = x.ndim == 3
    message_bytes = math.prod(x.shape) * x.dtype.itemsize // (ranks if loopback else 1)
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return jax.ffi.ffi_call(
        "rivals.loopback" if loopback else "rivals.mesh",
        outputs * (2 if kind == "all_reduce_norm" else 1),
        **options,
    )(
        x,
        *others,
        kind=kind,
        one_shot=kind != "wire" and one_shot(ranks, message_bytes),
        read=read,
        eps=np.float32(eps),
    )
