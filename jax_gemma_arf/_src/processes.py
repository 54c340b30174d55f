"""Facts that the processes of a job exchange before any of them may decide for the kernel.

A process knows of itself whether the extension is built and which GPUs reach each other; were each
to decide from that alone, one might fall back while its peers wait. So it is exchanged once, by all
of them, and everybody decides from all of it.
"""

import dataclasses
import functools
import platform
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_gemma_arf._src import extension
from jax_gemma_arf._src.operands import ONE_SHOT_MAX_BYTES
from jax_gemma_arf._version import __version__

#: Set to 1 to run everything as psum; with several processes, in any of them, before initialize().
DISABLE_VARIABLE = "JAX_GEMMA_ARF_DISABLE"


@dataclasses.dataclass(frozen=True)
class ProcessFacts:
    """Facts of one process. All are numbers, to be gathered as an array."""

    host: int  # the same for processes that run under one kernel
    version: int  # checksum of the package's, and of the limits of one-shot
    built: int
    flashinfer: int  # whether FlashInfer's kernels were built, too
    nvlinked: int  # whether all GPUs it sees reach each other over NVLink
    visible_gpus: int
    # CUDA error of mapping memory of the host's other processes, or 0; initialize tries it.
    ipc_error: int = dataclasses.field(default=0, kw_only=True)
    disabled: int


_gathered: list[ProcessFacts] | None = None


def initialize() -> None:
    """Lets the kernel run in a job of several processes.

    Call it once in every process, after ``jax.distributed.initialize()`` and before a fused
    operation is first lowered. It gathers what each process can do, and whether the processes of a
    host can map each other's GPU memory, so that all decide alike; until then every call of such a
    job is psum and the tail. In a job of one process it does nothing.
    """
    global _gathered  # noqa: PLW0603
    if jax.process_count() == 1:
        return
    mine = dataclasses.asdict(own_facts())
    rows = _gather(np.array([*mine.values()], np.uint32))
    facts = [ProcessFacts(**dict(zip(mine, map(int, row)))) for row in rows]
    errors = _gather(np.array([_ipc_error(facts)], np.uint32))
    _gathered = [
        dataclasses.replace(process, ipc_error=int(error))
        for process, (error,) in zip(facts, errors)
    ]


def _ipc_error(facts: list[ProcessFacts]) -> int:
    """Tries to map GPU memory of the host's other processes, which separate containers may forbid.

    All processes try it or none does, since they exchange handles.

    Args:
      facts: of every process, by index.

    Returns:
      The CUDA error, or 0.
    """
    built = extension.load()
    able = all(p.built and not p.disabled and p.version == facts[0].version for p in facts)
    if built is None or not able or jax.default_backend() != "gpu":
        return 0
    index = jax.process_index()

    def gather(message: bytes) -> list[bytes]:
        rows = _gather(np.frombuffer(message, np.uint32))
        return [
            row.tobytes()
            for i, row in enumerate(rows)
            if i != index and facts[i].host == facts[index].host
        ]

    return built.try_ipc(jax.local_devices()[0].local_hardware_id, gather)


def _gather(mine: np.ndarray) -> list[np.ndarray]:
    """Gathers an array [n] of every process: a list of them, by process index.

    multihost_utils.process_allgather needs the same number of devices in every process, and jit.
    """
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("devices",))
    with jax.disable_jit(False), jax.transfer_guard("allow"):  # whatever the user has set
        rows = jax.make_array_from_callback(
            (devices.size, mine.size), NamedSharding(mesh, P("devices")), lambda _: mine[None]
        )
        everything = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, P()))(rows)
        rows = np.asarray(everything.addressable_data(0))
    of_process = {device.process_index: row for device, row in zip(devices, rows)}
    return [row for _, row in sorted(of_process.items(), key=lambda item: item[0])]


def known(processes: int) -> list[ProcessFacts] | None:
    """Facts of every process, by process index; None for several before initialize."""
    return [own_facts()] if processes == 1 else _gathered


def disabled() -> bool:
    """Returns whether a process that this one knows of switches the kernel off."""
    return (
        any(p.disabled for p in _gathered)
        if _gathered is not None
        else extension.is_set(DISABLE_VARIABLE)
    )


def own_facts() -> ProcessFacts:
    """Returns the facts of this process."""
    peers = extension.nvlink_peers()
    return ProcessFacts(
        host=_checksum(_boot_id()),
        version=_checksum(f"{__version__} {sorted(ONE_SHOT_MAX_BYTES.items())}"),
        built=extension.load() is not None,
        flashinfer=extension.load("flashinfer") is not None,
        nvlinked=bool(peers) and all(all(row) for row in peers),
        visible_gpus=len(peers),
        disabled=extension.is_set(DISABLE_VARIABLE),
    )


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
