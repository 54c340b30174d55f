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
#: Bytes of x on one rank. Above it FlashInfer's int32 indices and the workspace grow too large.
MAX_MESSAGE_BYTES = 256 << 20
#: Bytes of x on one rank up to which one-shot is used, by axis size. One-shot pushes N - 1 messages
#: and has no barrier; two-shot moves 2 (N - 1) / N messages between barriers of 7 us together.
#: N = 2, measured on two H100s: one-shot is the faster at every size, but by only 5% from 10 MiB,
#: where its three Lamport generations of N messages take three times two-shot's memory. N = 4 and
#: 8, not measured: where the wire time saved, at 320 GB/s, is worth the barriers.
ONE_SHOT_MAX_BYTES = {2: 16 << 20, 4: 1 << 20, 8: 512 << 10}
#: Bytes of x on one rank above which psum is taken unless implementation is "cuda". Measured on two
#: H100s: XLA's all-reduce catches up at 22 MB and is 12% ahead at 88 MB, where the wire is all that
#: counts and the kernel's extra passes over memory show. N = 4 and 8 not measured.
PSUM_ABOVE_BYTES = 16 << 20
#: Architectures that the extension holds code for: Hopper and datacenter Blackwell.
COMPUTE_CAPABILITIES = ("9.0", "10.0")
#: Set to 1 to run everything as psum. Read when a function is traced; the same on all processes.
DISABLE_VARIABLE = "JAX_GEMMA_ARF_DISABLE"

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether a call runs as the kernel.

    Attributes:
      ok: True if it does.
      reason: why not, and what to change; with ok, what will run.
      algorithm: "one_shot" or "two_shot", or None without ok.
    """

    ok: bool
    reason: str
    algorithm: str | None = None

    def __bool__(self) -> bool:
        return self.ok


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What the decision needs to know of a client's devices."""

    platform: str
    compute_capabilities: tuple[str, ...]
    kinds: tuple[str, ...]
    nvlinked: bool


@functools.cache
def device_facts(client: object) -> DeviceFacts:
    """Facts of all devices of a JAX client (``device.client``)."""
    devices = client.devices()  # type: ignore[attr-defined]
    platform = devices[0].platform
    capabilities = {str(getattr(d, "compute_capability", "")) for d in devices}
    built = extension.load() if platform == "gpu" else None
    nvlinked = built is not None and all(all(row) for row in built.nvlink_peers())
    return DeviceFacts(
        platform=platform,
        compute_capabilities=tuple(sorted(capabilities)),
        kinds=tuple(sorted({d.device_kind for d in devices})),
        nvlinked=nvlinked,
    )


def axis_names(axis_name: AxisName) -> tuple[str, ...]:
    """axis_name as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def replica_groups(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axis_name: AxisName):
    """[groups, ranks]: positions in the mesh, in row-major order, of each group's ranks."""
    names = axis_names(axis_name)
    ids = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    axes = [mesh.axis_names.index(name) for name in names]
    return np.moveaxis(ids, axes, range(-len(axes), 0)).reshape(-1, axis_size(mesh, names))


def choose_algorithm(axis_size: int, message_bytes: int) -> str:
    """The rule: one-shot up to ONE_SHOT_MAX_BYTES[axis_size], two-shot above."""
    return "one_shot" if message_bytes <= ONE_SHOT_MAX_BYTES[axis_size] else "two_shot"


def fusion_support(
    x_shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis_name: AxisName,
) -> Support:
    """Why :func:`jax_gemma_arf.fused_post_ff` will or will not run as the kernel.

    Args:
      x_shape: [..., D], the shape of x on one rank, as inside jax.shard_map.
      dtype: x's dtype.
      mesh: the mesh. An AbstractMesh has no devices, so only what is static is checked.
      axis_name: the mesh axis (or axes) of tensor parallelism.

    Returns:
      A Support, true if the kernel will run.

    Raises:
      ValueError: if axis_name is not an axis of the mesh, or x_shape has no last axis.
    """
    missing = [name for name in axis_names(axis_name) if name not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"axis_name must name axes of the mesh {mesh.axis_names}, got {axis_name!r}"
        )
    if len(x_shape) == 0:
        raise ValueError("x must have a last axis of D elements, got the shape ()")
    client = mesh.devices.flat[0].client if isinstance(mesh, jax.sharding.Mesh) else None
    return decide(tuple(x_shape), jnp.dtype(dtype), mesh=mesh, axis_name=axis_name, client=client)


def decide(
    x_shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    axis_name: AxisName,
    client: object | None,
    manual_axes: frozenset[str] | None = None,
    forced: bool = False,
) -> Support:
    """:func:`fusion_support`, as the lowering asks it.

    Args:
      client: the JAX client whose devices will run the call; None if there is none, as when
        lowering for CUDA on a machine without it: then the devices are not checked.
      manual_axes: the mesh axes that are manual; None for all.
      forced: whether the kernel is wanted also where psum is expected to be as fast.
    """
    message_bytes = math.prod(x_shape) * dtype.itemsize
    objections = itertools.chain(
        _static_objections(x_shape, dtype, mesh, axis_name, manual_axes),
        _machine_objections(mesh, axis_name, client),
        _speed_objections(message_bytes) if not forced else (),
    )
    reason = next(objections, None)
    if reason is not None:
        return Support(False, reason)
    size = axis_size(mesh, axis_name)
    algorithm = choose_algorithm(size, message_bytes)
    return Support(True, f"one {algorithm.replace('_', '-')} launch over {size} ranks", algorithm)


def _static_objections(x_shape, dtype, mesh, axis_name, manual_axes) -> Iterator[str]:
    """What speaks against the kernel wherever the call runs."""
    hidden = x_shape[-1]
    message_bytes = math.prod(x_shape) * dtype.itemsize
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        yield f"switched off by {DISABLE_VARIABLE}"
    if (size := axis_size(mesh, axis_name)) not in AXIS_SIZES:
        name = _display(axis_name)
        yield f"axis {name} must have 2, 4 or 8 ranks for the kernel, got {size}"
    if dtype not in DTYPES:
        yield f"x must be bfloat16, float16 or float32, got {dtype}"
    if hidden % 64 != 0 or not 256 <= hidden <= 16384:
        yield f"D must be a multiple of 64 from 256 to 16384, got {hidden}"
    if message_bytes == 0:
        yield f"x of shape {x_shape} has no tokens"
    if message_bytes > MAX_MESSAGE_BYTES:
        tokens = MAX_MESSAGE_BYTES // (hidden * dtype.itemsize)
        yield (
            f"x has {message_bytes} bytes on a rank, above the workspace cap of "
            f"{MAX_MESSAGE_BYTES}; use at most {tokens} tokens a call"
        )
    manual = set(mesh.axis_names) if manual_axes is None else manual_axes
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in manual]
    if others:
        yield (
            f"mesh axes {others} are not manual, so XLA would gather the operands over them; "
            "make jax.shard_map manual over all axes of the mesh"
        )


def _machine_objections(mesh, axis_name, client) -> Iterator[str]:
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
    if not _within_processes(mesh, axis_name, client):
        yield (
            f"axis {_display(axis_name)} spans hosts or processes; the kernel needs each replica "
            "group inside one process"
        )
    if not facts.nvlinked:
        yield "not every pair of GPUs has NVLink peer access (nvidia-smi topo -m)"


def _speed_objections(message_bytes: int) -> Iterator[str]:
    """What speaks against it although it could run."""
    if message_bytes > PSUM_ABOVE_BYTES:
        yield (
            f"x has {message_bytes} bytes on a rank, and above {PSUM_ABOVE_BYTES} psum is as fast; "
            'implementation="cuda" runs the kernel all the same'
        )


def _display(axis_name: AxisName) -> str:
    return " x ".join(map(repr, axis_names(axis_name)))


def axis_size(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, axis_name: AxisName) -> int:
    """The number of ranks in a replica group."""
    return math.prod(mesh.shape[name] for name in axis_names(axis_name))


def _within_processes(mesh, axis_name: AxisName, client) -> bool:
    """Whether every replica group lies within one process."""
    if len({d.process_index for d in client.devices()}) == 1:
        return True
    if not isinstance(mesh, jax.sharding.Mesh):  # devices unknown
        return False
    processes = np.array([d.process_index for d in mesh.devices.flat])
    grouped = processes[replica_groups(mesh, axis_name)]
    return bool((grouped == grouped[:, :1]).all())
