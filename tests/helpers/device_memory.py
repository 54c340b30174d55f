"""A GPU's memory through the CUDA driver, past JAX: to fill it, and to write where none should."""

import contextlib
import ctypes

MIB = 1 << 20
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


def _status(name: str, *arguments) -> int:
    return getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)


def _call(name: str, *arguments) -> None:
    status = _status(name, *arguments)
    assert status == 0, f"{name} returned {status}"


@contextlib.contextmanager
def _context_of(device: int):
    """The context that JAX uses on a device is the calling thread's."""
    context, handle = ctypes.c_void_p(), ctypes.c_int()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(handle), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    _call("cuCtxPushCurrent_v2", context)
    yield
    _call("cuCtxPopCurrent_v2", ctypes.byref(context))
    _call("cuDevicePrimaryCtxRelease_v2", handle)


def free_bytes(device: int) -> int:
    """Returns the bytes that cudaMalloc could still allocate, about."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _context_of(device):
        _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def _allocate(device: int, size: int) -> int | None:
    """Allocates `size` bytes. Returns None if there is no such block."""
    block = ctypes.c_uint64()
    with _context_of(device):
        status = _status("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(size))
    assert status in (0, OUT_OF_MEMORY), f"cuMemAlloc returned {status}"
    return block.value if status == 0 else None


def fill(device: int, leave: int) -> list[int]:
    """Allocates all but about `leave` bytes. Returns what release takes."""
    blocks = []
    for size in (1024 * MIB, 64 * MIB, 2 * MIB):
        while free_bytes(device) >= leave + size:
            block = _allocate(device, size)
            if block is None:  # what is free is in pieces
                break
            blocks.append(block)
    return blocks


def fill_up(device: int) -> list[int]:
    """Allocates until there is not even memory for a small buffer. Returns what release takes."""
    blocks = fill(device, 0)
    for size in (64 << 10, 4 << 10, 512):
        while (block := _allocate(device, size)) is not None:
            blocks.append(block)
    return blocks


def release(device: int, blocks: list[int]) -> None:
    with _context_of(device):
        for block in blocks:
            _call("cuMemFree_v2", ctypes.c_uint64(block))


def write_byte(device: int, address: int, value: int) -> None:
    with _context_of(device):
        _call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(value), ctypes.c_size_t(1))
        _call("cuCtxSynchronize")
