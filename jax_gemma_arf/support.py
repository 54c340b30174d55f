"""The decision: the kernel or psum, and which algorithm.

Made from static shapes, the mesh, and facts that every process sees alike or has told the others
(processes.py), so that all ranks decide alike; never from a failure on one of them. JAX may reuse a
lowering for another set of devices of the same client, so device facts are those of all the
client's devices, not only of the mesh's.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_gemma_arf import extension, processes

# The limits of the kernels (ffi/call_limits.h): how many ranks, which D, how many norms of the
# finished row, how many bytes of partial sums on one rank, and how many of these in one-shot.
AXIS_SIZES = (2, 4, 8)
WIDTH_MULTIPLE, MIN_WIDTH, MAX_WIDTH = 64, 256, 16384
MAX_NEXT_NORMS = 3
MAX_MESSAGE_BYTES = 256 << 20
MAX_ONE_SHOT_BYTES = 64 << 20

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
#: Bytes of partial sums on one rank up to which one-shot is used, by axis size. One-shot pushes
#: N - 1 messages and waits once; two-shot pushes 2 (N - 1) / N and waits twice. N = 2: measured on
#: two H100s. N = 4 and 8, not measured: where the bytes saved, at 320 GB/s, are worth the 1.7 us
#: that the second wait costs at N = 2.
ONE_SHOT_MAX_BYTES = {2: 2 << 20, 4: 384 << 10, 8: 128 << 10}
#: The same for FlashInfer's kernels, by the rule of its own Python side for bfloat16 (trtllm_ar):
#: up to 512, 64 and 42 MiB in 2 N messages.
FLASHINFER_ONE_SHOT_MAX_BYTES = {2: 128 << 20, 4: 8 << 20, 8: (42 << 20) // 16}
#: Architectures that the extension holds code for: Hopper and datacenter Blackwell (B200, B300).
COMPUTE_CAPABILITIES = ("9.0", "10.0", "10.3")

AxisName = str | tuple[str, ...]
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Support:
    """The decision for one call: kernel or psum, and why.

    Attributes:
      ok: True if it does.
      reason: why not, and what to change; with ok, what will run.
      algorithm: "one_shot" or "two_shot", or None without ok.
      deliberate: without ok, True if psum is what is wanted: nothing to reduce, or switched off.
    """

    ok: bool
    reason: str
    algorithm: str | None = None
    deliberate: bool = False

    def __bool__(self) -> bool:
        return self.ok


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """Facts of a client's devices that the decision needs."""

    platform: str
    compute_capabilities: tuple[str, ...]
    kinds: tuple[str, ...]
    processes: tuple[int, ...]  # of each device, in the client's order


@functools.cache
def device_facts(client: object) -> DeviceFacts:
    """Facts of all devices of a JAX client (``device.client``)."""
    devices = client.devices()  # type: ignore[attr-defined]
    gpu = devices[0].platform == "gpu"
    return DeviceFacts(
        platform=devices[0].platform,
        compute_capabilities=tuple(sorted({str(d.compute_capability) for d in devices if gpu})),
        kinds=tuple(sorted({d.device_kind for d in devices})),
        processes=tuple(d.process_index for d in devices),
    )


def axis_names(axis_name: AxisName, mesh: AnyMesh, argument: str = "axis_name") -> tuple[str, ...]:
    """Returns axis_name as a tuple, after checking that it names different axes of the mesh.

    Raises:
      ValueError: if it does not; the error calls it argument.
    """
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names or len(set(names)) != len(names) or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"{argument} must name one or several different axes of the mesh {mesh.axis_names}, "
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


def choose_algorithm(ranks: int, message_bytes: int, implementation: str = "cuda") -> str:
    """Returns the algorithm: one-shot up to the limit of the implementation, two-shot above."""
    limits = FLASHINFER_ONE_SHOT_MAX_BYTES if implementation == "flashinfer" else ONE_SHOT_MAX_BYTES
    return "one_shot" if message_bytes <= min(limits[ranks], MAX_ONE_SHOT_BYTES) else "two_shot"


def fusion_support(
    x_shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    *,
    mesh: AnyMesh,
    axis_name: AxisName,
    branches: int = 1,
    implementation: str | None = None,
) -> Support:
    """Why a fused operation will or will not run as the kernel.

    Args:
      x_shape: [..., D], the shape of x (or dense, or experts) on one rank, as inside a
        jax.shard_map that is manual over all axes of the mesh.
      dtype: x's dtype.
      mesh: the mesh. An AbstractMesh has no devices, so only what is static is checked.
      axis_name: the mesh axis (or axes) of tensor parallelism.
      branches: how many partial sums the call reduces: 2 for fused_moe_tail, 1 for the others.
      implementation: "cuda" or None for the kernels of this library, "flashinfer" for FlashInfer's.

    Returns:
      A Support, true if the kernel will run.

    Raises:
      ValueError: if axis_name does not name axes of the mesh, x_shape has no last axis or a
        negative size, branches is neither 1 nor 2, or implementation is none of these.
      TypeError: if a size is neither an integer nor one of jax.export's symbolic dimensions.

    Example:
      >>> support = jga.fusion_support((4, 5376), jnp.bfloat16, mesh=mesh, axis_name="tp")
      >>> support.ok, support.reason
      (False, 'platform is cpu, not CUDA')
    """
    shape = tuple(map(_size, x_shape))
    if not shape:
        raise ValueError("x must have a last axis of D elements, got the shape ()")
    if any(isinstance(size, int) and size < 0 for size in shape):
        raise ValueError(f"x_shape must hold sizes of at least 0, got {shape}; -1 is not inferred")
    if branches not in (1, 2):
        raise ValueError(f"branches must be 1 or 2, got {branches!r}")
    if implementation not in ("cuda", "flashinfer", None):
        raise ValueError(
            f'implementation must be "cuda", "flashinfer" or None, got {implementation!r}'
        )
    client = mesh.devices.flat[0].client if isinstance(mesh, jax.sharding.Mesh) else None
    names = axis_names(axis_name, mesh)
    return decide(
        shape,
        jnp.dtype(dtype),
        mesh=mesh,
        names=names,
        client=client,
        branches=branches,
        implementation=implementation or "cuda",
    )


def _size(size: Any) -> Any:
    """Returns a size as an int, be it one of Python, NumPy or JAX; a symbolic one unchanged."""
    if export.is_symbolic_dim(size):
        return size
    try:
        return operator.index(size)
    except TypeError:
        raise TypeError(
            f"x_shape must hold integers, got {size!r} of type {type(size).__name__}"
        ) from None


def decide(
    x_shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    mesh: AnyMesh,
    names: tuple[str, ...],
    client: object | None,
    branches: int = 1,
    manual_axes: frozenset[str] | None = None,
    implementation: str = "cuda",
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
      implementation: "cuda" or "flashinfer".
    """
    ranks = group_size(mesh, names)
    message = _Message(x_shape, dtype, branches)
    if reason := next(_nothing_to_gain(message, ranks), None):
        return Support(False, reason, deliberate=True)
    objections = itertools.chain(
        _static_objections(message, ranks, names, implementation),
        _mesh_objections(mesh, manual_axes),
        _machine_objections(client, implementation),
        _process_objections(client, mesh, names, implementation),
    )
    if reason := next(objections, None):
        return Support(False, reason)
    algorithm = choose_algorithm(ranks, message.bytes, implementation)
    whose = " of FlashInfer's" if implementation == "flashinfer" else ""
    launch = f"one {algorithm.replace('_', '-')} launch{whose} over {ranks} ranks"
    return Support(True, launch, algorithm)


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
    """Yields the reasons why psum is the right choice."""
    if processes.disabled():
        yield f"switched off by {processes.DISABLE_VARIABLE}"
    if ranks == 1:
        yield "the axis has one rank, so there is nothing to reduce"
    if 0 in message.shape:
        yield f"x of shape {message.shape} has no tokens"


def _static_objections(
    message: _Message, ranks: int, names: tuple[str, ...], implementation: str
) -> Iterator[str]:
    """Yields the properties of the call that the kernel does not support."""
    if implementation == "flashinfer" and message.branches > 1:
        yield "FlashInfer's kernels reduce one message, and fused_moe_tail has two"
    if ranks not in AXIS_SIZES:
        yield f"axis {_quoted(names)} must have 2, 4 or 8 ranks, got {ranks}"
    if message.dtype not in DTYPES:
        yield f"x must be bfloat16, float16 or float32, got {message.dtype}"
    if not message.static:
        yield f"x must have a static shape, got {message.shape}"
    hidden = message.shape[-1]
    if hidden % WIDTH_MULTIPLE != 0 or not MIN_WIDTH <= hidden <= MAX_WIDTH:
        yield (
            f"D must be a multiple of {WIDTH_MULTIPLE} from {MIN_WIDTH} to {MAX_WIDTH}, "
            f"got {hidden}"
        )
    if message.bytes > MAX_MESSAGE_BYTES:
        tokens = MAX_MESSAGE_BYTES // (message.branches * hidden * message.dtype.itemsize)
        yield (
            f"the partial sums have {message.bytes} bytes on a rank, above the workspace cap of "
            f"{MAX_MESSAGE_BYTES}; use at most {tokens} tokens a call"
        )


def _mesh_objections(mesh: AnyMesh, manual_axes: frozenset[str] | None) -> Iterator[str]:
    """Yields the properties of the mesh that XLA would handle wrongly."""
    manual = set(mesh.axis_names) if manual_axes is None else manual_axes
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in manual]
    if others:
        yield (
            f"mesh axes {others} are not manual, so XLA would gather the operands over them; "
            "make jax.shard_map manual over all axes of the mesh"
        )


def _machine_objections(client: object | None, implementation: str) -> Iterator[str]:
    """Yields the reasons why these devices cannot run the kernel."""
    missing = extension.why_missing(implementation)
    if missing is not None and (client is None or _compile_only(client)):
        yield missing
    if client is None:
        return
    facts = device_facts(client)
    if facts.platform != "gpu":
        yield f"platform is {facts.platform}, not CUDA"
    if not set(facts.compute_capabilities) <= set(COMPUTE_CAPABILITIES):
        yield (
            f"compute capability must be one of {', '.join(COMPUTE_CAPABILITIES)} on all "
            f"devices, got {', '.join(facts.compute_capabilities)}"
        )
    if len(facts.kinds) > 1:
        yield f"devices must be alike, got {', '.join(facts.kinds)}"


def _compile_only(client: object) -> bool:
    """Returns whether the devices only compile, as jax.experimental.topologies describes them."""
    return type(client).__name__ == "CompileOnlyPyClient"


def _process_objections(
    client: object | None, mesh: AnyMesh, names: tuple[str, ...], implementation: str
) -> Iterator[str]:
    """Yields the reasons why a process that holds the devices cannot run the kernel."""
    if client is None or _compile_only(client):
        return
    owners = device_facts(client).processes
    known = processes.known(len(set(owners)))
    if known is None:
        yield (
            f"the devices are in {len(set(owners))} processes, which do not know of each other; "
            "call jax_gemma_arf.initialize() in each, after jax.distributed.initialize()"
        )
        return
    for index, process in enumerate(known):
        where = f" (process {index})" if len(known) > 1 else ""
        if not (process.flashinfer if implementation == "flashinfer" else process.built):
            missing = extension.why_missing(implementation)
            yield (missing or "the extension was not built") + where
        if process.version != known[0].version:
            yield f"process {index} runs another version of jax_gemma_arf than process 0"
        needed = sum(known[owner].host == process.host for owner in owners)
        if not process.visible_gpus:
            yield (
                f"the extension's CUDA runtime finds no GPU where JAX has {needed} on this host; "
                "the NVIDIA driver is older than the CUDA release that the extension was compiled "
                f"with, or broken (see nvidia-smi){where}"
            )
        if process.visible_gpus < needed:
            yield (
                f"process {index} sees {process.visible_gpus} of its host's {needed} GPUs in this "
                "job; show it all (CUDA_VISIBLE_DEVICES) and choose with "
                "jax.distributed.initialize(local_device_ids=...)"
            )
        if not process.nvlinked:
            yield f"not every pair of GPUs has NVLink peer access (nvidia-smi topo -m){where}"
        if process.ipc_error:
            yield (
                f"process {index} cannot map the GPU memory of its host's other processes (CUDA "
                f"IPC, error {process.ipc_error}); run them in one container, or start their "
                "containers with --ipc=host --pid=host"
            )
    hosts = [known[owner].host for owner in owners]
    if any(len(set(group)) > 1 for group in _by_group(hosts, client, mesh, names)):
        yield (
            f"axis {_quoted(names)} reaches over several hosts; the ranks of a group must be on "
            "one, as along the last axis of a mesh"
        )


def _by_group(
    facts: list[int], client: object, mesh: AnyMesh, names: tuple[str, ...]
) -> list[list[int]]:
    """facts of the client's devices, in their order, by replica group.

    A lowering does not know its devices. An abstract mesh is taken to lie on the client's, in their
    order; if it does not, the ranks find out when they meet, and all raise an error.
    """
    devices = client.devices()  # type: ignore[attr-defined]
    if isinstance(mesh, jax.sharding.Mesh):
        of_device = dict(zip(devices, facts))
        facts = [of_device[device] for device in mesh.devices.flat]
    elif mesh.size > len(devices):
        return []
    return [[facts[i] for i in group] for group in replica_groups(mesh, names)]


def _quoted(names: tuple[str, ...]) -> str:
    return " x ".join(map(repr, names))
