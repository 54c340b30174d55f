"""The decision: the kernel or psum, and which algorithm.

Made from static shapes, the mesh, and facts that every process sees alike or has told the others
(processes.py), so that all ranks decide alike; never from a failure on one of them. JAX may reuse a
lowering for another set of devices of the same client, so the device facts cover all devices of the
client, not only the devices of the mesh.
"""

import dataclasses
import enum
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_gemma_arf._src import extension, processes
from jax_gemma_arf._src.mesh import (
    AnyMesh,
    AxisName,
    axis_names,
    group_size,
    quoted,
    replica_groups,
)
from jax_gemma_arf._src.operands import (
    AXIS_SIZES,
    DTYPES,
    MAX_MESSAGE_BYTES,
    MAX_ONE_SHOT_BYTES,
    MAX_WIDTH,
    MIN_WIDTH,
    ONE_SHOT_MAX_BYTES,
    WIDTH_MULTIPLE,
    Operation,
    branches_of,
)

#: The device kind whose limits apply to kinds that have no entry for the number of ranks.
DEFAULT_KIND = "NVIDIA H100 80GB HBM3"
#: FlashInfer's limits by ranks, by the rule of its own Python side for bfloat16 (trtllm_ar): up to
#: 512, 64 and 42 MiB in 2 N messages.
FLASHINFER_ONE_SHOT_MAX_BYTES = {2: 128 << 20, 4: 8 << 20, 8: (42 << 20) // 16}
#: Architectures that the extension holds code for: Hopper and datacenter Blackwell (B200, B300).
COMPUTE_CAPABILITIES = ("9.0", "10.0", "10.3")


class FallbackCode(enum.StrEnum):
    """The kinds of reasons for which a call runs as psum.

    The logger "jax_gemma_arf" logs each once, with the code as the record's attribute ``code``. A
    code equals its name in lower case, as in ``record.code == "width"``.

    Attributes:
      SWITCHED_OFF: JAX_GEMMA_ARF_DISABLE is set.
      ONE_RANK: there is nothing to reduce.
      NO_TOKENS: x is empty.
      BRANCHES: FlashInfer's kernels reduce one message.
      RANKS: the axis does not have 2, 4 or 8 ranks.
      DTYPE: x is not bfloat16, float16 or float32.
      SYMBOLIC_SHAPE: a size is not known at compile time.
      WIDTH: D is not supported.
      MESSAGE_BYTES: the partial sums do not fit the largest workspace.
      PARTLY_MANUAL: jax.shard_map leaves a mesh axis to the compiler.
      SEVERAL_PLATFORMS: the program is exported for other platforms too.
      VMAPPED_SCALE: a norm scale or layer_scalar has a vmapped axis.
      NOT_BUILT: the compiled part is missing.
      PLATFORM: the devices are not CUDA's.
      COMPUTE_CAPABILITY: there is no code for the devices.
      MIXED_DEVICES: the devices are of several kinds.
      NOT_INITIALIZED: initialize() was not called in a job of several processes.
      VERSIONS: the processes run different versions of jax_gemma_arf, or have other limits of
        one-shot.
      NO_VISIBLE_GPU: the extension's CUDA runtime finds no GPU.
      HIDDEN_GPUS: a process does not see all of its host's GPUs in the job.
      NO_NVLINK: GPUs do not reach each other over NVLink.
      CUDA_IPC: processes cannot map each other's GPU memory.
      SEVERAL_HOSTS: a replica group reaches over several hosts.
    """

    SWITCHED_OFF = enum.auto()
    ONE_RANK = enum.auto()
    NO_TOKENS = enum.auto()
    BRANCHES = enum.auto()
    RANKS = enum.auto()
    DTYPE = enum.auto()
    SYMBOLIC_SHAPE = enum.auto()
    WIDTH = enum.auto()
    MESSAGE_BYTES = enum.auto()
    PARTLY_MANUAL = enum.auto()
    SEVERAL_PLATFORMS = enum.auto()
    VMAPPED_SCALE = enum.auto()
    NOT_BUILT = enum.auto()
    PLATFORM = enum.auto()
    COMPUTE_CAPABILITY = enum.auto()
    MIXED_DEVICES = enum.auto()
    NOT_INITIALIZED = enum.auto()
    VERSIONS = enum.auto()
    NO_VISIBLE_GPU = enum.auto()
    HIDDEN_GPUS = enum.auto()
    NO_NVLINK = enum.auto()
    CUDA_IPC = enum.auto()
    SEVERAL_HOSTS = enum.auto()


#: Codes with which psum is the right choice.
DELIBERATE = {FallbackCode.SWITCHED_OFF, FallbackCode.ONE_RANK, FallbackCode.NO_TOKENS}


class Objection(NamedTuple):
    """One reason why a call does not run as the kernel.

    Attributes:
      code: its kind.
      reason: a sentence that says what does not hold, and what to change where the caller can.
    """

    code: FallbackCode
    reason: str


@dataclasses.dataclass(frozen=True)
class Support:
    """The decision for one call, kernel or psum, and why; true if it is the kernel.

    Attributes:
      objections: the reasons why the call runs as psum; empty if it runs as the kernel.
      algorithm: "one_shot" or "two_shot", or None with objections.
      launch: what will run as the kernel; empty with objections.
    """

    objections: tuple[Objection, ...] = ()
    algorithm: str | None = None
    launch: str = ""

    @property
    def ok(self) -> bool:
        """True if the call runs as the kernel."""
        return not self.objections

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of all objections."""
        return tuple(objection.reason for objection in self.objections)

    @property
    def reason(self) -> str:
        """The first of the reasons; without any, what will run."""
        return self.objections[0].reason if self.objections else self.launch

    @property
    def deliberate(self) -> bool:
        """True if psum is the right choice: nothing to reduce, or the kernel is switched off."""
        return any(objection.code in DELIBERATE for objection in self.objections)

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


def one_shot_max_bytes(ranks: int, implementation: str = "cuda", kind: str = DEFAULT_KIND) -> int:
    """Returns the bytes of partial sums on one rank up to which one-shot is used."""
    if implementation == "flashinfer":
        limit = FLASHINFER_ONE_SHOT_MAX_BYTES[ranks]
    else:
        limit = ONE_SHOT_MAX_BYTES.get((kind, ranks), ONE_SHOT_MAX_BYTES[DEFAULT_KIND, ranks])
    return min(limit, MAX_ONE_SHOT_BYTES)


def choose_algorithm(
    ranks: int, message_bytes: int, implementation: str = "cuda", kind: str = DEFAULT_KIND
) -> str:
    """Returns the algorithm: one-shot up to the limit of the implementation, two-shot above.

    kind: of all devices; DEFAULT_KIND where there is no client to ask.
    """
    limit = one_shot_max_bytes(ranks, implementation, kind)
    return "one_shot" if message_bytes <= limit else "two_shot"


def client_of(mesh: AnyMesh) -> Any:
    """Returns the client of a mesh's devices; None for an AbstractMesh."""
    return mesh.devices.flat[0].client if isinstance(mesh, jax.sharding.Mesh) else None


def device_kind(client: object | None) -> str:
    """Returns the kind of a client's devices, which are alike wherever the kernel runs."""
    return DEFAULT_KIND if client is None else device_facts(client).kinds[0]


def fusion_support(
    x_shape: Sequence[int],
    dtype: jax.typing.DTypeLike,
    *,
    mesh: AnyMesh,
    axis_name: AxisName,
    op: Operation = "fused_post_ff",
    manual_axes: AxisName | AbstractSet[str] | None = None,
    implementation: str | None = None,
) -> Support:
    """Returns whether a fused operation will run as the kernel, and all reasons why not.

    Args:
      x_shape: [..., D], the shape of x (or dense, or experts) on one rank, as inside the
        jax.shard_map.
      dtype: x's dtype.
      mesh: the mesh. An AbstractMesh has no devices, so only what is static is checked.
      axis_name: the mesh axis (or axes) of tensor parallelism.
      op: the operation, "fused_post_ff", "fused_sandwich", "fused_all_reduce_norm" or
        "fused_moe_tail"; the last reduces two partial sums, the others one.
      manual_axes: the axes over which the jax.shard_map is manual (its axis_names); None for all
        axes of the mesh.
      implementation: "cuda" or None for the kernels of this library, "flashinfer" for FlashInfer's.

    Returns:
      A Support, true if the kernel will run; otherwise with all reasons why not.

    Raises:
      ValueError: if axis_name or manual_axes does not name axes of the mesh, if manual_axes lacks
        an axis of axis_name, if x_shape has no last axis or a negative size, or if op or
        implementation is unknown.
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
    branches = branches_of(op)
    if implementation not in ("cuda", "flashinfer", None):
        raise ValueError(
            f'implementation must be "cuda", "flashinfer" or None, got {implementation!r}'
        )
    names = axis_names(axis_name, mesh)
    return decide(
        shape,
        jnp.dtype(dtype),
        mesh=mesh,
        names=names,
        client=client_of(mesh),
        branches=branches,
        manual_axes=_manual(manual_axes, mesh, names),
        implementation=implementation or "cuda",
    )


def _manual(
    manual_axes: AxisName | AbstractSet[str] | None, mesh: AnyMesh, names: tuple[str, ...]
) -> frozenset[str] | None:
    """Returns manual_axes after checking that they are axes of the mesh and include names."""
    if manual_axes is None:
        return None
    if isinstance(manual_axes, AbstractSet):
        manual_axes = tuple(manual_axes)
    manual = frozenset(axis_names(manual_axes, mesh, "manual_axes"))
    if not manual.issuperset(names):
        raise ValueError(f"manual_axes must include axis_name {quoted(names)}, got {manual_axes!r}")
    return manual


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
      x_shape, dtype, mesh: as in fusion_support.
      names: the axes of tensor parallelism.
      client: the JAX client whose devices will run the call; None if there is none, as when
        lowering for CUDA on a machine without it: then the devices are not checked.
      branches: how many partial sums the call reduces.
      manual_axes: the mesh axes that are manual; None for all.
      implementation: "cuda" or "flashinfer".
    """
    ranks = group_size(mesh, names)
    message = _Message(x_shape, dtype, branches)
    objections = (
        *_nothing_to_gain(message, ranks),
        *_static_objections(message, ranks, names, implementation),
        *_mesh_objections(mesh, manual_axes),
        *_machine_objections(client, implementation),
        *_process_objections(client, mesh, names, implementation),
    )
    if objections:
        return Support(objections)
    algorithm = choose_algorithm(ranks, message.bytes, implementation, device_kind(client))
    whose = " of FlashInfer's" if implementation == "flashinfer" else ""
    launch = f"one {algorithm.replace('_', '-')} launch{whose} over {ranks} ranks"
    return Support((), algorithm, launch)


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


def _nothing_to_gain(message: _Message, ranks: int) -> Iterator[Objection]:
    """Yields the reasons why psum is the right choice."""
    if processes.disabled():
        yield Objection(FallbackCode.SWITCHED_OFF, f"switched off by {processes.DISABLE_VARIABLE}")
    if ranks == 1:
        yield Objection(
            FallbackCode.ONE_RANK, "the axis has one rank, so there is nothing to reduce"
        )
    if 0 in message.shape:
        yield Objection(FallbackCode.NO_TOKENS, f"x of shape {message.shape} has no tokens")


def _static_objections(
    message: _Message, ranks: int, names: tuple[str, ...], implementation: str
) -> Iterator[Objection]:
    """Yields the properties of the call that the kernel does not support."""
    if implementation == "flashinfer" and message.branches > 1:
        yield Objection(
            FallbackCode.BRANCHES,
            "FlashInfer's kernels reduce one message, and fused_moe_tail has two",
        )
    if ranks not in (1, *AXIS_SIZES):
        yield Objection(
            FallbackCode.RANKS, f"axis {quoted(names)} must have 2, 4 or 8 ranks, got {ranks}"
        )
    if message.dtype not in DTYPES:
        yield Objection(
            FallbackCode.DTYPE, f"x must be bfloat16, float16 or float32, got {message.dtype}"
        )
    if not message.static:
        yield Objection(
            FallbackCode.SYMBOLIC_SHAPE, f"x must have a static shape, got {message.shape}"
        )
        return  # symbolic sizes do not compare
    width = message.shape[-1]
    if width % WIDTH_MULTIPLE != 0 or not MIN_WIDTH <= width <= MAX_WIDTH:
        yield Objection(
            FallbackCode.WIDTH,
            f"D must be a multiple of {WIDTH_MULTIPLE} from {MIN_WIDTH} to {MAX_WIDTH}, "
            f"got {width}",
        )
    if message.bytes > MAX_MESSAGE_BYTES:
        tokens = MAX_MESSAGE_BYTES // (message.branches * width * message.dtype.itemsize)
        yield Objection(
            FallbackCode.MESSAGE_BYTES,
            f"the partial sums have {message.bytes} bytes on a rank, above the workspace cap of "
            f"{MAX_MESSAGE_BYTES}; use at most {tokens} tokens a call",
        )


def _mesh_objections(mesh: AnyMesh, manual_axes: frozenset[str] | None) -> Iterator[Objection]:
    """Yields the properties of the mesh that XLA would handle wrongly."""
    manual = set(mesh.axis_names) if manual_axes is None else manual_axes
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in manual]
    if others:
        yield Objection(
            FallbackCode.PARTLY_MANUAL,
            f"mesh axes {others} are not manual, so XLA would gather the operands over them; "
            "make jax.shard_map manual over all axes of the mesh",
        )


def _machine_objections(client: object | None, implementation: str) -> Iterator[Objection]:
    """Yields the reasons why these devices cannot run the kernel."""
    missing = extension.why_missing(implementation)
    if missing is not None and (client is None or _compile_only(client)):
        yield Objection(FallbackCode.NOT_BUILT, missing)
    if client is None:
        return
    facts = device_facts(client)
    if facts.platform != "gpu":
        yield Objection(FallbackCode.PLATFORM, f"platform is {facts.platform}, not CUDA")
    if not set(facts.compute_capabilities) <= set(COMPUTE_CAPABILITIES):
        yield Objection(
            FallbackCode.COMPUTE_CAPABILITY,
            f"compute capability must be one of {', '.join(COMPUTE_CAPABILITIES)} on all "
            f"devices, got {', '.join(facts.compute_capabilities)}",
        )
    if len(facts.kinds) > 1:
        yield Objection(
            FallbackCode.MIXED_DEVICES, f"devices must be alike, got {', '.join(facts.kinds)}"
        )


def _compile_only(client: object) -> bool:
    """Returns whether the devices only compile, as jax.experimental.topologies describes them."""
    return type(client).__name__ == "CompileOnlyPyClient"


def _process_objections(
    client: object | None, mesh: AnyMesh, names: tuple[str, ...], implementation: str
) -> Iterator[Objection]:
    """Yields the reasons why a process that holds the devices cannot run the kernel."""
    if client is None or _compile_only(client) or device_facts(client).platform != "gpu":
        return
    owners = device_facts(client).processes
    known = processes.known(len(set(owners)))
    if known is None:
        yield Objection(
            FallbackCode.NOT_INITIALIZED,
            f"the devices are in {len(set(owners))} processes, which do not know of each other; "
            "call jax_gemma_arf.initialize() in each, after jax.distributed.initialize()",
        )
        return
    for index, process in enumerate(known):
        where = f" (process {index})" if len(known) > 1 else ""
        built = {"cuda": process.built, "flashinfer": process.flashinfer}
        for name in dict.fromkeys((implementation, "cuda")):
            if not built[name]:
                missing = extension.why_missing(name) or "the extension was not built"
                yield Objection(FallbackCode.NOT_BUILT, missing + where)
        if process.version != known[0].version:
            yield Objection(
                FallbackCode.VERSIONS,
                f"process {index} runs another version of jax_gemma_arf, or has other limits of "
                "one-shot, than process 0",
            )
        if not process.built:
            continue  # _ffi looks at the GPUs, also for FlashInfer's kernels
        needed = sum(known[owner].host == process.host for owner in owners)
        if not process.visible_gpus:
            yield Objection(
                FallbackCode.NO_VISIBLE_GPU,
                f"the extension's CUDA runtime finds no GPU where JAX has {needed} on this host; "
                "the NVIDIA driver is older than the CUDA release that the extension was compiled "
                f"with, or broken (see nvidia-smi){where}",
            )
            continue
        if process.visible_gpus < needed:
            yield Objection(
                FallbackCode.HIDDEN_GPUS,
                f"process {index} sees {process.visible_gpus} of its host's {needed} GPUs in this "
                "job; show it all (CUDA_VISIBLE_DEVICES) and choose with "
                "jax.distributed.initialize(local_device_ids=...)",
            )
        if not process.nvlinked:
            yield Objection(
                FallbackCode.NO_NVLINK,
                f"not every pair of GPUs has NVLink peer access (nvidia-smi topo -m){where}",
            )
        if process.ipc_error:
            yield Objection(
                FallbackCode.CUDA_IPC,
                f"process {index} cannot map the GPU memory of its host's other processes (CUDA "
                f"IPC, error {process.ipc_error}); run them in one container, or start their "
                "containers with --ipc=host --pid=host",
            )
    hosts = [known[owner].host for owner in owners]
    if any(len(set(group)) > 1 for group in _by_group(hosts, client, mesh, names)):
        yield Objection(
            FallbackCode.SEVERAL_HOSTS,
            f"axis {quoted(names)} reaches over several hosts; the ranks of a group must be on "
            "one, as along the last axis of a mesh",
        )


def _by_group(
    facts: list[int], client: object, mesh: AnyMesh, names: tuple[str, ...]
) -> list[list[int]]:
    """facts of the client's devices, in their order, by replica group.

    A lowering does not know its devices. An abstract mesh is taken to lie on the client's, in their
    order; if it does not, the ranks detect it when they exchange workspace handles, and all raise
    an error.
    """
    devices = client.devices()  # type: ignore[attr-defined]
    if isinstance(mesh, jax.sharding.Mesh):
        of_device = dict(zip(devices, facts))
        facts = [of_device[device] for device in mesh.devices.flat]
    elif mesh.size > len(devices):
        return []
    return [[facts[i] for i in group] for group in replica_groups(mesh, names)]
