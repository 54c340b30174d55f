"""``python -m jax_gemma_arf``: what this machine can do, and why."""

import argparse
import importlib.metadata

import jax
import jax.numpy as jnp

from jax_gemma_arf import __version__, fusion_support, workspace_bytes
from jax_gemma_arf._src import extension
from jax_gemma_arf._src.operands import AXIS_SIZES

GEMMA4_WIDTHS = {"E2B": 1536, "E4B": 2560, "26B-A4B": 2816, "31B": 5376}


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_gemma_arf",
        description="Prints whether this machine runs the kernel, and why.",
    )
    parser.add_argument(
        "--extension", action="store_true", help="print only whether the extension is there"
    )
    arguments = parser.parse_args()
    print(f"jax_gemma_arf {__version__}: {describe_extension()}")
    print(f'implementation="flashinfer": {describe_flashinfer()}')
    if not arguments.extension:
        print_devices()
        print_decisions()
        print_memory()


def describe_extension() -> str:
    """One line on the compiled part; its handlers are registered in passing."""
    built = extension.load()
    if built is None:
        return f"runs as psum, {extension.why_missing()}"
    targets = ", ".join(built.registrations())
    return f"extension, handlers registered: {targets}"


def describe_flashinfer() -> str:
    """One line on FlashInfer's kernels."""
    built = extension.load("flashinfer")
    if built is None:
        return f"not there, {extension.why_missing('flashinfer')}"
    return f"there, of FlashInfer {built.flashinfer_version}"


def print_devices() -> None:
    """Versions, devices, and which GPUs reach which over NVLink."""
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "jax-cuda13-plugin")
        if _installed(name)
    ]
    print(", ".join(versions))
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        suffix = f", compute capability {capability}" if capability else ""
        print(f"  {device}: {device.device_kind}{suffix}, process {device.process_index}")
    peers = extension.nvlink_peers()
    if len(peers) > 1:
        print("NVLink peer access (row reaches column):")
        for row in peers:
            print("  " + " ".join("yes" if linked else "no " for linked in row))


def print_decisions() -> None:
    """The decision for the four Gemma 4 sizes, bfloat16, at one and at 4096 tokens."""
    count = len(jax.devices())
    sizes = [size for size in AXIS_SIZES if size <= count] or [count]
    for size in sizes:
        mesh = jax.make_mesh((size,), ("tp",), devices=jax.devices()[:size])
        print(f"tensor parallelism over {size} of {count} devices, bfloat16:")
        for model, width in GEMMA4_WIDTHS.items():
            for tokens in (1, 4096):
                support = fusion_support((tokens, width), jnp.bfloat16, mesh=mesh, axis_name="tp")
                kernel = "kernel" if support.ok else "psum  "
                why = "; ".join(support.reasons) or support.launch
                print(f"  {model:8} D = {width}, {tokens:4} tokens: {kernel} ({why})")


def print_memory() -> None:
    """Device memory of workspaces for the four Gemma 4 sizes, bfloat16, by ranks."""
    if extension.load() is None:
        return
    print("workspaces for calls of up to 8192 tokens, bfloat16, MB on each GPU:")
    print("           " + "".join(f"{size:6} ranks" for size in AXIS_SIZES))
    for model, width in GEMMA4_WIDTHS.items():
        cells = []
        for size in AXIS_SIZES:
            mesh = jax.sharding.AbstractMesh((size,), ("tp",))
            op = "fused_moe_tail" if model == "26B-A4B" else "fused_post_ff"
            needed = workspace_bytes(8192, width, jnp.bfloat16, mesh=mesh, axis_name="tp", op=op)
            cells.append(needed / 1e6)
        print(f"  {model:9}" + "".join(f"{megabytes:12.0f}" for megabytes in cells))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
