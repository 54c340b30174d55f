"""The decision: the kernel or psum, and which algorithm.

Made from static shapes, the mesh, and facts that every process sees alike, so that all ranks decide
alike; never from a failure on one of them. JAX may reuse a lowering for another set of devices of
the same client, so device facts are those of all the client's devices, not only of the mesh's.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_gemma_arf import extension

AXIS_SIZES = (2, 4, 8)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
#: How many norms of the finished row one call may hold.
MAX_NEXT_NORMS = 3
#: Bytes of the partial sums on one rank. Above it FlashInfer's int32 indices and the workspace grow
#: too large.
MAX_MESSAGE_BYTES = 256 << 20
#: Bytes of the partial sums on one rank up to which one-shot is used, by axis size. One-shot pushes
#: N - 1 messages and has no barrier; two-shot moves 2 (N - 1) / N messages between barriers of 7 us
#: together. N = 2, measured on two H100s: one-shot is the faster at every size, but by only 5% from
#: 10 MiB, where its three Lamport generations of N messages take three times two-shot's memory.
#: N = 4 and 8, not measured: where the wire time saved, at 320 GB/s, is worth the barriers.
ONE_SHOT_MAX_BYTES = {2: 16 << 20, 4: 1 << 20, 8: 512 << 10}
#: Bytes of the partial sums on one rank above which psum is taken unless implementation is "cuda".
#: Measured on two H100s: XLA's all-reduce catches up at 22 MB and is 12% ahead at 88 MB, where the
#: wire is all that counts and the kernel's extra passes over memory show. N = 4 and 8 not measured.
PSUM_ABOVE_BYTES = 16 << 20
#: Architectures that the extension holds code for: Hopper and datacenter Blackwell.
COMPUTE_CAPABILITIES = ("9.0", "10.0")
#: Set to 1 to run everything as psum. Read when a call is lowered; set it alike on all processes.
DISABLE_VARIABLE = "JAX_GEMMA_ARF_DISABLE"

AxisName = str | tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether a call runs as the kernel.

    Attributes:
      ok: True if it does.
      reason: why not, and what to change; with ok, what will run.
      algorithm: "one_shot" or "two_shot", or None without ok.
      deliberate: without ok, True if psum is what is wanted: nothing to reduce, psum as fast, or
        switched off.
    """

    ok: bool
    reason: str
    algorithm: str | None = None
    deliberate: bool = False

    def __bool__(self) -> bool:
        return self.ok


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What the decision needs to know of a client's devices."""

    platform: str
    compute_capabilities: tuple[str, ...]
    kinds: tuple[str, ...]
    processes: int
    nvlinked: bool


@functools.cache
def device_facts(client: object) -> DeviceFacts:
    """Facts of all devices of a JAX client (``device.client``)."""
    devices = client.devices()  # type: ignore[attr-defined]
    platform = devices[0].platform
    built = extension.load() if platform == "gpu" else None
    peers = built.nvlink_peers() if built is not None else []
    return DeviceFacts(
        platform=platform,
        compute_capabilities=tuple(sorted({str(d.compute_capability) for d in devices}))
        if platform == "gpu"
        else (),
        kinds=tuple(sorted({d.device_kind for d in devices})),
        processes=len({d.process_index for d in devices}),
        nvlinked=bool(peers) and all(all(row) for row in peers),
    )


def axis_names(axis_name: AxisName, mesh: AnyMesh) -> tuple[str, ...]:
    """axis_name as a tuple, after checking that it names different axes of the mesh.

    Raises:
      ValueError: if it does not.
    """
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names or len(set(names)) != len(names) or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"axis_name must name one or several different axes of the mesh {mesh.axis_names}, "
            f"got {axis_name!r}"
        )
    return names


def group_size(mesh: AnyMesh, names: tuple[str, ...]) -> int:
    """The number of ranks in a replica group."""
    return math.prod(mesh.shape[name] for name in names)


def replica_groups(mesh: AnyMesh, names: tuple[str, ...]) -> np.ndarray:
    """[groups, ranks]: positions in the mesh, in row-major order, of each group's ranks."""
    ids = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    axes = [mesh.axis_names.index(name) for name in names]
    return np.moveaxis(ids, axes, range(-len(axes), 0)).reshape(-1, group_size(mesh, names))


def choose_algorithm(ranks: int, message_bytes: int) -> str:
    """The rule: one-shot up to ONE_SHOT_MAX_BYTES[ranks], two-shot above."""
    return "one_shot" if message_bytes <= ONE_SHOT_MAX_BYTES[ranks] else "two_shot"


def fusion_support(
    x_shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    *,
    mesh: AnyMesh,
    axis_name: AxisName,
    branches: int = 1,
) -> Support:
    """Why a fused operation will or will not run as the kernel.

    Args:
      x_shape: [..., D], the shape of x (or dense, or experts) on one rank, as inside a
        jax.shard_map that is manual over all axes of the mesh.
      dtype: x's dtype.
      mesh: the mesh. An AbstractMesh has no devices, so only what is static is checked.
      axis_name: the mesh axis (or axes) of tensor parallelism.
      branches: how many partial sums the call reduces: 2 for fused_moe_tail, 1 for the others.

    Returns:
      A Support, true if the kernel will run.

    Raises:
      ValueError: if axis_name does not name axes of the mesh, x_shape has no last axis, or branches
        is neither 1 nor 2.
    """
    if len(x_shape) == 0:
        raise ValueError("x must have a last axis of D elements, got the shape ()")
    if branches not in (1, 2):
        raise ValueError(f"branches must be 1 or 2, got {branches!r}")
    client = mesh.devices.flat[0].client if isinstance(mesh, jax.sharding.Mesh) else None
    names = axis_names(axis_name, mesh)
    return decide(
        tuple(x_shape), jnp.dtype(dtype), mesh=mesh, names=names, client=client, branches=branches
    )


def decide(
    x_shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    mesh: AnyMesh,
    names: tuple[str, ...],
    client: object | None,
    branches: int = 1,
    manual_axes: frozenset[str] | None = None,
    forced: bool = False,
) -> Support:
    """:func:`fusion_support`, as the lowering asks it.

    Args:
      x_shape: as there.
      dtype: as there.
      mesh: as there.
      names: the axes of tensor parallelism.
      client: the JAX client whose devices will run the call; None if there is none, as when
        lowering for CUDA on a machine without it: then the devices are not checked.
      branches: as there.
      manual_axes: the mesh axes that are manual; None for all.
      forced: whether the kernel is wanted also where psum is expected to be as fast.
    """
    ranks = group_size(mesh, names)
    message = _Message(x_shape, dtype, branches)
    if reason := next(_nothing_to_gain(message, ranks), None):
        return Support(False, reason, deliberate=True)
    objections = itertools.chain(
        _static_objections(message, ranks, names),
        _mesh_objections(mesh, manual_axes),
        _machine_objections(client),
    )
    if reason := next(objections, None):
        return Support(False, reason)
    if message.bytes > PSUM_ABOVE_BYTES and not forced:
        reason = (
            f"the partial sums have {message.bytes} bytes on a rank, and above {PSUM_ABOVE_BYTES} "
            'psum is as fast; implementation="cuda" runs the kernel all the same'
        )
        return Support(False, reason, deliberate=True)
    algorithm = choose_algorithm(ranks, message.bytes)
    return Support(True, f"one {algorithm.replace('_', '-')} launch over {ranks} ranks", algorithm)


@dataclasses.dataclass(frozen=True)
class _Message:
    """The partial sums on one rank: as many of one shape as there are branches."""

    shape: tuple[int, ...]
    dtype: np.dtype
    branches: int

    @property
    def static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)

    @property
    def bytes(self) -> int:
        return self.branches * math.prod(self.shape) * self.dtype.itemsize


def _nothing_to_gain(message: _Message, ranks: int) -> Iterator[str]:
    """What makes psum the right choice."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        yield f"switched off by {DISABLE_VARIABLE}"
    if ranks == 1:
        yield "the axis has one rank, so there is nothing to reduce"
    if 0 in message.shape:
        yield f"x of shape {message.shape} has no tokens"


def _static_objections(message: _Message, ranks: int, names: tuple[str, ...]) -> Iterator[str]:
    """What the kernel is not made for."""
    if ranks not in AXIS_SIZES:
        yield f"axis {' x '.join(map(repr, names))} must have 2, 4 or 8 ranks, got {ranks}"
    if message.dtype not in DTYPES:
        yield f"x must be bfloat16, float16 or float32, got {message.dtype}"
    if not message.static:
        yield f"x must have a static shape, got {message.shape}"
    hidden = message.shape[-1]
    if hidden % 64 != 0 or not 256 <= hidden <= 16384:
        yield f"D must be a multiple of 64 from 256 to 16384, got {hidden}"
    if message.bytes > MAX_MESSAGE_BYTES:
        tokens = MAX_MESSAGE_BYTES // (message.branches * hidden * message.dtype.itemsize)
        yield (
            f"the partial sums have {message.bytes} bytes on a rank, above the workspace cap of "
            f"{MAX_MESSAGE_BYTES}; use at most {tokens} tokens a call"
        )


def _mesh_objections(mesh: AnyMesh, manual_axes: frozenset[str] | None) -> Iterator[str]:
    """What XLA would get wrong."""
    manual = set(mesh.axis_names) if manual_axes is None else manual_axes
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in manual]
    if others:
        yield (
            f"mesh axes {others} are not manual, so XLA would gather the operands over them; "
            "make jax.shard_map manual over all axes of the mesh"
        )


def _machine_objections(client: object | None) -> Iterator[str]:
    """What speaks against it on these devices, with this installation."""
    facts = None if client is None else device_facts(client)
    if facts is not None and facts.platform != "gpu":
        yield f"platform is {facts.platform}, not CUDA"
    if (missing := extension.why_missing()) is not None:
        yield missing
    if facts is None:
        return
    if not set(facts.compute_capabilities) <= set(COMPUTE_CAPABILITIES):
        yield (
            f"compute capability must be one of {', '.join(COMPUTE_CAPABILITIES)} on all "
            f"devices, got {', '.join(facts.compute_capabilities)}"
        )
    if len(facts.kinds) > 1:
        yield f"devices must be alike, got {', '.join(facts.kinds)}"
    if facts.processes > 1:
        # What is below, and whether the extension was built, is known of this process alone.
        yield f"the devices span {facts.processes} hosts or processes; the kernel needs one process"
    if not facts.nvlinked:
        yield "not every pair of GPUs has NVLink peer access (nvidia-smi topo -m)"
