"""Bad input: a ValueError or TypeError at trace time that names the argument, what must hold and
what came."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runners import make_mesh

import jax_gemma_arf as jga
from jax_gemma_arf.loopback import loopback_post_ff

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def spec(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD = {
    "x": spec(4, 640),
    "residual": spec(4, 640),
    "norm_scale": spec(640),
    "layer_scalar": spec(),
    "axis_name": "tp",
}

# (arguments that replace the good ones, error, what its message must say)
BAD = {
    "x_scalar": ({"x": spec()}, ValueError, r"x must be \[\.\.\., D\], got the shape \(\)"),
    "no_hidden": (
        {"x": spec(4, 0), "residual": spec(4, 0), "norm_scale": spec(0)},
        ValueError,
        r"x must have D > 0 .* \(4, 0\)",
    ),
    "residual_shape": (
        {"residual": spec(4, 512)},
        ValueError,
        r"residual must have x's shape \(4, 640\), got \(4, 512\)",
    ),
    "residual_broadcast": (
        {"residual": spec(640)},
        ValueError,
        r"residual must have x's shape \(4, 640\), got \(640,\)",
    ),
    "norm_scale_shape": (
        {"norm_scale": spec(641)},
        ValueError,
        r"norm_scale must have the shape \(640,\) .* got \(641,\)",
    ),
    "norm_scale_rank": (
        {"norm_scale": spec(1, 640)},
        ValueError,
        r"norm_scale must have the shape \(640,\)",
    ),
    "layer_scalar_shape": (
        {"layer_scalar": spec(2)},
        ValueError,
        r"layer_scalar must have the shape \(\) or \(1,\), got \(2,\)",
    ),
    "x_integer": (
        {"x": spec(4, 640, dtype=jnp.int32)},
        TypeError,
        "x must be bfloat16, float16 or float32, got int32",
    ),
    "norm_scale_float8": (
        {"norm_scale": spec(640, dtype=jnp.float8_e4m3fn)},
        TypeError,
        "norm_scale must be .* got float8_e4m3fn",
    ),
    "layer_scalar_integer": (
        {"layer_scalar": spec(dtype=jnp.int32)},
        TypeError,
        "layer_scalar must be .* got int32",
    ),
    "mixed_halves": (
        {"residual": spec(4, 640, dtype=F16)},
        TypeError,
        "bfloat16 and float16 must not be mixed .* x bfloat16, residual float16",
    ),
    "mixed_halves_scale": (
        {"x": spec(4, 640, dtype=F32), "norm_scale": spec(640, dtype=F16)},
        TypeError,
        "must not be mixed",
    ),
    "eps_zero": ({"eps": 0.0}, ValueError, "eps must be positive in float32, got 0"),
    "eps_tiny": ({"eps": 1e-60}, ValueError, "eps must be positive in float32, got 0"),
    "eps_negative": ({"eps": -1e-6}, ValueError, "eps must be positive in float32, got -"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps must be finite in float32, got nan"),
    "eps_inf": ({"eps": float("inf")}, ValueError, "eps must be finite in float32, got inf"),
    "eps_huge": ({"eps": 1e39}, ValueError, r"eps must be finite in float32, got 1e\+39"),
    "eps_bool": ({"eps": True}, TypeError, "eps must be a static number, got bool"),
    "eps_text": ({"eps": "small"}, TypeError, "eps must be a static number, got str"),
    "scale_offset_nan": (
        {"scale_offset": float("nan")},
        ValueError,
        "scale_offset must be finite in float32, got nan",
    ),
    "axis_unknown": (
        {"axis_name": "model"},
        ValueError,
        r"axis_name must name one or several different axes of the mesh \('tp',\), got 'model'",
    ),
    "axis_empty": (
        {"axis_name": ()},
        ValueError,
        "axis_name must name one or several different axes",
    ),
    "axis_twice": (
        {"axis_name": ("tp", "tp")},
        ValueError,
        "axis_name must name one or several different axes",
    ),
    "implementation": (
        {"implementation": "triton"},
        ValueError,
        'implementation must be "cuda", "xla" or None, got \'triton\'',
    ),
}


REPLICATED, PER_RANK = P(), P("tp")


def trace(mesh, *, x_spec=PER_RANK, residual_spec=REPLICATED, **arguments):
    """Traces one call without running it. x has a leading axis of ranks."""
    arguments = GOOD | arguments
    operands = [arguments.pop(name) for name in ("x", "residual", "norm_scale", "layer_scalar")]
    operands[0] = jax.ShapeDtypeStruct((2, *operands[0].shape), operands[0].dtype)

    def local(x, *others):
        return jga.fused_post_ff(x[0], *others, **arguments)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(x_spec, residual_spec, P(), P()), out_specs=P()
    )
    return jax.eval_shape(mapped, *operands)


def test_good_arguments_trace(mesh):
    assert trace(mesh) == spec(4, 640)


@pytest.mark.parametrize("name", BAD)
def test_rejected(mesh, name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        trace(mesh, **arguments)


def test_traced_eps(mesh):
    with pytest.raises(TypeError, match="eps must be a static number"):
        jax.eval_shape(lambda eps: trace(mesh, eps=eps), spec(dtype=F32))


def test_outside_shard_map():
    with pytest.raises(ValueError, match=r"call inside jax\.shard_map"):
        jga.fused_post_ff(jnp.ones((4, 640)), jnp.ones((4, 640)), jnp.ones(640), axis_name="tp")


def test_axis_not_manual(cpus):
    """shard_map over data alone: tp exists, but is not manual."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4])

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x, residual, norm_scale, axis_name="tp")

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(ValueError, match=r"which are \['data'\] here, got 'tp'"):
        jax.eval_shape(mapped, spec(4, 640), spec(4, 640), spec(640))


def test_vmap_axis_is_not_a_mesh_axis(mesh):
    with pytest.raises(ValueError, match="axis_name must name one or several"):
        jax.eval_shape(
            jax.vmap(
                functools.partial(jga.fused_post_ff, axis_name="batch"),
                (0, None, None),
                axis_name="batch",
            ),
            spec(2, 4, 640),
            spec(4, 640),
            spec(640),
        )


def test_varying_residual(mesh):
    with pytest.raises(ValueError, match=r"residual must be replicated over axis_name.*\['tp'\]"):
        trace(mesh, residual=spec(8, 640), residual_spec=P("tp"))


@pytest.mark.parametrize("name", ["norm_scale", "layer_scalar"])
def test_varying_scales(mesh, name):
    specs = {"norm_scale": P(), "layer_scalar": P()} | {name: P("tp")}
    shapes = {"norm_scale": (640,), "layer_scalar": (1,)}
    shapes[name] = (2 * shapes[name][0],)

    def local(x, *others):
        return jga.fused_post_ff(x[0], *others, axis_name="tp")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P("tp"), P(), *specs.values()), out_specs=P()
    )
    with pytest.raises(ValueError, match=rf"{name} must be replicated over axis_name"):
        jax.eval_shape(mapped, spec(2, 4, 640), spec(4, 640), *(spec(*s) for s in shapes.values()))


def test_x_varying_over_one_of_two_axes(cpus):
    mesh = make_mesh((2, 2), ("a", "b"), cpus[:4])

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x[0], residual, norm_scale, axis_name=("a", "b"))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P())
    with pytest.raises(ValueError, match=r"over all of \['a', 'b'\], got one varying over \['a'\]"):
        jax.eval_shape(mapped, spec(2, 4, 640), spec(4, 640), spec(640))


def test_reduced_x(mesh):
    """x that is replicated already would be summed N times over."""
    with pytest.raises(ValueError, match="x must hold partial sums, varying or unreduced"):
        trace(mesh, x_spec=P())


def test_cuda_on_cpu_says_why(mesh):
    operands = np.ones((2, 4, 640), F32), np.ones((4, 640), F32), np.ones(640, F32)
    mapped = jax.shard_map(
        lambda x, *o: jga.fused_post_ff(x[0], *o, axis_name="tp", implementation="cuda"),
        mesh=mesh,
        in_specs=(P("tp"), P(), P()),
        out_specs=P(),
    )
    with pytest.raises(NotImplementedError, match="kernel cannot run: platform is cpu, not CUDA"):
        jax.jit(mapped)(*operands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis_name": "model"}, "axis_name must name one or several different axes of the mesh"),
        ({"w_down": spec(60, 640)}, "must agree and be divisible by the 2 ranks .* 64 and 60"),
        (
            {"activations": spec(4, 63), "w_down": spec(63, 640)},
            "must agree and be divisible by the 2 ranks of 'tp', got 63 and 63",
        ),
        ({"w_down": spec(64)}, r"w_down \[F, D\], got shapes \(4, 64\) and \(64,\)"),
        ({"residual": spec(5, 640)}, r"residual must have the shape \(4, 640\) .* got \(5, 640\)"),
        ({"token_spec": P(None, None)}, "token_spec must have at most 1 entries"),
        ({"token_spec": P("tp")}, "token_spec must name axes of the mesh other than"),
        ({"token_spec": P("model")}, "token_spec must name axes of the mesh other than"),
        ({"w_down": spec(64, 640, dtype=F32)}, "must have one dtype.*bfloat16 and float32"),
        (
            {"activations": spec(4, 64, dtype=jnp.int32), "w_down": spec(64, 640, dtype=jnp.int32)},
            "must have one dtype, bfloat16, float16 or float32, got int32 and int32",
        ),
    ],
)
def test_down_proj_rejects(mesh, arguments, message):
    good = {
        "activations": spec(4, 64),
        "w_down": spec(64, 640),
        "residual": spec(4, 640),
        "norm_scale": spec(640),
        "axis_name": "tp",
    }
    arguments = good | arguments
    names = ("activations", "w_down", "residual", "norm_scale")
    operands = [arguments.pop(name) for name in names]
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(functools.partial(jga.down_proj_post_ff, mesh=mesh, **arguments), *operands)


def test_loopback_rejects(built):
    with pytest.raises(ValueError, match=r"x must be \[N, \*residual.shape\] with N = 2, 4 or 8"):
        loopback_post_ff(jnp.ones((3, 4, 640)), jnp.ones((4, 640)), jnp.ones(640))
