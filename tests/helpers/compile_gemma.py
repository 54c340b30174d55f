"""Compiles decode steps of small Gemma models for H100s, on a machine that need not have a GPU.

    PYTHONPATH=tests:build/cuda_plugin python -P -m helpers.compile_gemma VARIANT...

Prints a line of JSON for each program: the number of its fused calls, its collectives, as pairs
of operation and elements, and kernels that should not be there. What XLA makes of a lookup in a
sharded table, or of a weight that it wants in another order, shows only in programs compiled for
GPUs. Needs the CUDA plugin of JAX, which `make test` puts into build/cuda_plugin.
"""

import concurrent.futures
import functools
import json
import math
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax_plugins.xla_cuda13  # noqa: F401 (registers) # pyright: ignore[reportMissingImports]
import numpy as np
from jax.experimental import topologies

from helpers import gemma_models
from helpers import gemma_sizes as sizes
from jax_gemma_arf import TARGET_NAME, audit
from jax_gemma_arf.integrations.gemma import param_shardings, tensor_parallel

# What XLA asks of the device that it compiles for. From a H100 SXM.
TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  name: "NVIDIA H100 80GB HBM3"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0" device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CACHE_LENGTH = 32
# Ranks, batch, whether the step is in a loop.
PROGRAMS = ((2, 1, True), (2, 2, True), (2, 16, True), (2, 1, False), (4, 1, True))


def compiled(
    variant: str, ranks: int, batch: int, loop: bool, official: bool = False, wide: bool = False
) -> str:
    """Returns the optimised HLO of one decode step, or of four in a loop.

    official: of the unmodified model with the same parameter shardings, and without a cache.
    wide: of blocks as wide as 31B's, since XLA treats small weights otherwise.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{ranks}", target_config=TARGET
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("tp",))
    changes = sizes.WIDE if wide else {}
    model = gemma_models.official(variant, dtype=jnp.bfloat16, **changes)
    parallel = tensor_parallel(model, mesh)
    shapes = gemma_models.shapes(variant, **changes)
    params = gemma_models.structs(shapes, param_shardings(parallel, shapes), jnp.bfloat16)
    whole = jax.NamedSharding(mesh, jax.P())
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=whole)
    cache = None
    if not official:
        model = parallel
        make = functools.partial(model.init_cache, batch_size=batch, dtype=jnp.bfloat16)
        cache = jax.eval_shape(functools.partial(make, cache_length=CACHE_LENGTH))
        cache = gemma_models.structs(cache, model.cache_shardings(cache))

    def step(params, token, cache):
        inputs = {}
        if cache is not None:
            positions = cache["layer_0"]["end_index"][:, None]
            mask = jnp.arange(CACHE_LENGTH) <= positions[..., None]
            inputs = {"cache": cache, "positions": positions, "attention_mask": mask}
        out = model.apply({"params": params}, token, **inputs)
        return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), out.cache

    def steps(params, token, cache):
        if not loop:
            return step(params, token, cache)
        return jax.lax.fori_loop(0, 4, lambda _, carry: step(params, *carry), (token, cache))

    shardings = whole, jax.tree.map(lambda a: a.sharding, cache)
    jitted = jax.jit(steps, donate_argnums=2, out_shardings=shardings)
    # The choice of a kernel for each matmul is a quarter of the time, and none runs here.
    options = {"xla_gpu_autotune_level": 0}
    return jitted.lower(params, token, cache).compile(options).as_text() or ""


def collectives(text: str) -> list[tuple[str, int]]:
    """Returns the collectives in optimised HLO, each with the elements of its largest result."""
    return [(found.kind, found.elements) for found in audit(text)]


def step_of(text: str) -> str:
    """Returns the computation that has the fused calls: the body of the loop, if there is one."""
    return max(re.split(r"\n(?=%|ENTRY)", text), key=lambda part: part.count(TARGET_NAME))


def length_kernels(step: str, batch: int) -> int:
    """Returns how many kernels of a step write the length of one layer's cache alone."""
    return len(re.findall(rf"= s32\[{batch}\]\S* fusion\(", step))


def largest_result(step: str) -> int:
    """Returns the elements of the largest array that a kernel of a step writes."""
    written = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:fusion|copy|transpose)\(", step)
    return max(math.prod(int(n) for n in dims.split(",") if n) for dims in written)


def main() -> None:
    variants = sys.argv[1:]
    rows = [
        {"variant": "31B", "ranks": 2, "batch": batch, "loop": True, "wide": True}
        for batch in (1, 2)
    ]
    rows += [
        {"variant": variant, "ranks": ranks, "batch": batch, "loop": loop, "official": official}
        for variant in variants
        for official, programs in ((False, PROGRAMS), (True, [(2, 1, True)]))
        for ranks, batch, loop in programs
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, text in zip(rows, pool.map(lambda row: compiled(**row), rows)):
            calls = text.count(f'custom_call_target="{TARGET_NAME}"')
            found: dict[str, Any] = {"calls": calls, "collectives": collectives(text)}
            if calls:  # which tell where the step is
                step = step_of(text)
                found["largest_result"] = largest_result(step)
                found["length_kernels"] = length_kernels(step, row["batch"])
            print(json.dumps(row | found), flush=True)


if __name__ == "__main__":
    main()
