"""A GPU's memory through the CUDA driver, past JAX: to fill it, and to write where none should."""

import contextlib
import ctypes

MIB = 1 << 20


def _call(name: str, *arguments) -> None:
    status = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
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
    """What cudaMalloc could still have, about."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with _context_of(device):
        _call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def fill(device: int, leave: int) -> list[int]:
    """Allocates all but about so many bytes. Returns what release takes."""
    blocks = []
    for size in (1024 * MIB, 64 * MIB, 2 * MIB):
        while free_bytes(device) >= leave + size:
            block = ctypes.c_uint64()
            with _context_of(device):
                _call("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(size))
            blocks.append(block.value)
    return blocks


def release(device: int, blocks: list[int]) -> None:
    with _context_of(device):
        for block in blocks:
            _call("cuMemFree_v2", ctypes.c_uint64(block))


def write_byte(device: int, address: int, value: int) -> None:
    with _context_of(device):
        _call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(value), ctypes.c_size_t(1))
        _call("cuCtxSynchronize")
