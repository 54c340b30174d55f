"""All ranks of a tensor-parallel group on one GPU, for tests and benchmarks without a second one.

The ranks are streams of one device inside one FFI call, forked and joined by events. Everything but
the addresses of the peers is what a real mesh runs: workspace, handler, launch and kernels.

No communicator keeps runs apart here: dispatch from one thread, or set
``XLA_FLAGS=--xla_gpu_require_exclusive_lock=true``, so that XLA lets one run at a time have the
device.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_gemma_arf._src import extension, lowering
from jax_gemma_arf._src.decision import choose_algorithm
from jax_gemma_arf._src.operands import (
    AXIS_SIZES,
    ONE_BRANCH,
    TWO_BRANCHES,
    Operands,
    check_operands,
)

__all__ = ["Operands", "loopback_post_ff", "loopback_tail"]


def loopback_tail(
    operands: Operands,
    *,
    eps: float = 1e-6,
    scale_offset: float = 0.0,
    algorithm: str | None = None,
    max_ctas: int = 0,
    absent_rank: int = -1,
    local_ranks: tuple[int, ...] | None = None,
    axis_size: int | None = None,
    rendezvous: str = "",
    implementation: str = "cuda",
) -> tuple[jax.Array, ...]:
    """The kernel of any fused operation, all ranks on one CUDA device.

    Args:
      operands: the operation's operands, with partial sums [N, ..., D] of N = 2, 4 or 8 ranks
        (with local_ranks, [len(local_ranks), ..., D]; results likewise).
      eps: added to each mean of squares.
      scale_offset: 0 for Gemma 4, 1 for Gemma 2 and 3.
      algorithm: "one_shot", "two_shot", or None for the rule of a mesh of H100s.
      max_ctas: most thread blocks a rank may launch, from 8; 0 for all that fit.
      absent_rank: a rank that is not launched, so that the others wait for it; -1 for none.
      local_ranks: the ranks that this process holds, in the order of the partial sums' first axis,
        where other processes on the same GPU hold the rest; None for all.
      axis_size: with local_ranks, the number of ranks in all processes.
      rendezvous: with local_ranks, an empty directory, which all processes give alike, through
        which they exchange the addresses of their memory.
      implementation: "cuda", or "flashinfer" for FlashInfer's kernels, which take one branch.

    Returns:
      hidden and the next norms, [N, ..., D] each, of operands.dtype: what each rank computed.

    Raises:
      ValueError, TypeError: if N is not 2, 4 or 8, if local_ranks, axis_size and rendezvous do not
        fit, or as the fused operations.
      NotImplementedError: if the extension was not built.
    """
    if extension.load(implementation) is None:
        raise NotImplementedError(
            f"loopback needs the extension: {extension.why_missing(implementation)}"
        )
    shapes = [part.shape for part in operands.partial_sums]
    shape = shapes[0]
    _check_processes(local_ranks, axis_size, rendezvous)
    ranks = axis_size or (shape[0] if shape else 0)
    held = local_ranks or range(ranks)
    if (
        len(shape) < 2
        or ranks not in AXIS_SIZES
        or shapes != [(len(held), *shape[1:])] * len(shapes)
    ):
        raise ValueError(
            f"the partial sums must be [{'N' if axis_size is None else len(held)}, ..., D] each, "
            "with N = 2, 4 or 8 ranks, got the shapes " + ", ".join(map(str, shapes))
        )
    one_rank = jax.eval_shape(lambda parts: [part[0] for part in parts], operands.partial_sums)
    arguments = ONE_BRANCH if len(shapes) == 1 else TWO_BRANCHES
    check_operands(operands._replace(partial_sums=tuple(one_rank)), arguments)
    if algorithm is None:
        message_bytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in one_rank)
        algorithm = choose_algorithm(ranks, message_bytes, implementation)
    attributes = lowering.ffi_attributes(
        operands, algorithm, np.arange(ranks)[None], eps, scale_offset, max_ctas
    )
    attributes |= {
        "local_ranks": np.array(held, np.int64),
        "rendezvous": rendezvous,
        "absent_rank": np.int64(absent_rank),
    }
    result = jax.ShapeDtypeStruct(shape, operands.dtype)
    results = (result,) * (1 + len(operands.next_norm_scales))
    _, target = lowering.TARGETS[implementation]
    call = jax.ffi.ffi_call(target, results)
    return tuple(call(*jax.tree.leaves(operands), **attributes))


def _check_processes(
    local_ranks: tuple[int, ...] | None, axis_size: int | None, rendezvous: str
) -> None:
    """Checks the arguments that say which ranks other processes hold."""
    if local_ranks is None and axis_size is None and not rendezvous:
        return
    got = f"local_ranks={local_ranks}, axis_size={axis_size}, rendezvous={rendezvous!r}"
    if local_ranks is None or axis_size is None or not rendezvous:
        raise ValueError(
            "local_ranks, axis_size and rendezvous must be given together, where other processes "
            f"hold ranks, or not at all; got {got}"
        )
    if axis_size not in AXIS_SIZES:
        raise ValueError(f"axis_size must be 2, 4 or 8, the ranks of all processes; got {got}")
    if not local_ranks or list(local_ranks) != sorted({*local_ranks} & {*range(axis_size)}):
        raise ValueError(
            f"local_ranks must be ranks from 0 to {axis_size - 1}, each once and rising; got {got}"
        )


def loopback_post_ff(
    x: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    layer_scalar: jax.Array | None = None,
    **options,
) -> jax.Array:
    """:func:`jax_gemma_arf.fused_post_ff` by ``loopback_tail``, with x [N, ..., D].

    Args:
      x: [N, ..., D], the partial sums of N = 2, 4 or 8 ranks.
      residual: [..., D].
      norm_scale: [D].
      layer_scalar: () or (1,), or None for 1.
      **options: as of loopback_tail.

    Returns:
      [N, ..., D], residual.dtype: what each rank computed.
    """
    if layer_scalar is not None:
        layer_scalar = jnp.asarray(layer_scalar)
    (hidden,) = loopback_tail(Operands((x,), (norm_scale,), residual, layer_scalar), **options)
    return hidden
