"""Three ways to put a fused tail behind a down-projection, on the end of a Gemma feed-forward.

docs/adopting.md says which stack takes which. All three are compared with plain arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga

TOKENS, WIDTH, FF = 4, 256, 512
SHAPES = {"activations": (TOKENS, FF), "w_down": (FF, WIDTH), "residual": (TOKENS, WIDTH)}
SPECS = {"activations": P(None, "tensor"), "w_down": P("tensor", None), "residual": P(None, None)}


def explicit(activations, w_down, residual, norm_scale, layer_scalar, *, mesh: Mesh):
    """Explicit sharding: the matmul's type says that its result is not reduced yet."""
    unreduced = P(None, None, unreduced=frozenset({"tensor"}))
    partial_sums = jnp.dot(activations, w_down, out_sharding=jax.NamedSharding(mesh, unreduced))

    def tail(*operands):
        return jga.fused_post_ff(*operands, axis_name="tensor")

    in_specs = (unreduced, P(), P(), P())
    return jax.shard_map(tail, mesh=mesh, in_specs=in_specs, out_specs=P())(
        partial_sums, residual, norm_scale, layer_scalar
    )


def automatic(activations, w_down, residual, norm_scale, layer_scalar, *, mesh: Mesh):
    """Auto sharding, where no array can be unreduced: the matmul moves into the shard_map."""
    return jga.down_proj_post_ff(
        activations, w_down, residual, norm_scale, layer_scalar, mesh=mesh, axis_name="tensor"
    )


def manual(activations, w_down, residual, norm_scale, layer_scalar, *, mesh: Mesh):
    """A model inside one shard_map: the matmul is local, and its psum is left out."""

    def local(activations, w_down, *others):
        return jga.fused_post_ff(activations @ w_down, *others, axis_name="tensor")

    in_specs = (*SPECS.values(), P(), P())
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P())(
        activations, w_down, residual, norm_scale, layer_scalar
    )


def expected(activations, w_down, residual, norm_scale, layer_scalar):
    """In float64."""
    row = activations.astype(np.float64) @ w_down
    normed = row / np.sqrt(np.mean(row * row, axis=-1, keepdims=True) + 1e-6)
    return (normed * norm_scale + residual) * layer_scalar


def main() -> None:
    """Prints how far each is off; raises if any is too far."""
    jax.config.update("jax_num_cpu_devices", 2)
    rng = np.random.default_rng(0)
    shapes = [*SHAPES.values(), (WIDTH,), ()]
    specs = [*SPECS.values(), P(), P()]
    operands = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
    want = expected(*operands)
    devices = jax.devices()[:2]
    for style in (explicit, automatic, manual):
        kind = AxisType.Explicit if style is explicit else AxisType.Auto
        mesh = jax.make_mesh((len(devices),), ("tensor",), axis_types=(kind,), devices=devices)
        placed = [
            jax.device_put(operand, jax.NamedSharding(mesh, spec))
            for operand, spec in zip(operands, specs)
        ]
        found = jax.jit(functools.partial(style, mesh=mesh))(*placed)
        off = np.abs(np.asarray(found) - want).max()
        print(f"{style.__name__:10} {off:.1e}")
        if off > 1e-4:
            raise SystemExit(f"{style.__name__} is off by {off}")


if __name__ == "__main__":
    main()
