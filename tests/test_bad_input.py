"""Bad input: a ValueError or TypeError at trace time that names the argument, what must hold and
what came."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gemma_arf as jga
from helpers.runners import make_mesh
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_post_ff, loopback_tail

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def spec(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


ROW, SCALE = spec(4, 640), spec(640)
POST_FF = {"x": ROW, "residual": ROW, "norm_scale": SCALE, "layer_scalar": spec()}
GOOD = {
    "post_ff": POST_FF,
    "sandwich": POST_FF | {"next_norm_scale": (SCALE, SCALE)},
    "all_reduce_norm": {"x": ROW, "norm_scale": SCALE},
    "moe_tail": {
        "dense": ROW,
        "experts": ROW,
        "residual": ROW,
        "dense_norm_scale": SCALE,
        "expert_norm_scale": SCALE,
        "norm_scale": SCALE,
        "layer_scalar": spec(),
        "next_norm_scale": SCALE,
    },
}
PARTIAL_SUMS = ("x", "dense", "experts")
OPERANDS = {name for arguments in GOOD.values() for name in arguments}

# Of fused_post_ff: (arguments that replace the good ones, error, what its message must say)
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
        'implementation must be "cuda", "flashinfer", "xla" or None, got \'triton\'',
    ),
}


# Of the others, where they have more to check: (operation, and as above)
BAD_OTHERS = {
    "next_norm_scale_shape": (
        "sandwich",
        {"next_norm_scale": spec(641)},
        ValueError,
        r"next_norm_scale must have the shape \(640,\) for x of shape \(4, 640\), got \(641,\)",
    ),
    "second_next_norm_scale_shape": (
        "sandwich",
        {"next_norm_scale": (SCALE, spec(4, 640))},
        ValueError,
        r"next_norm_scale\[1\] must have the shape \(640,\) .* got \(4, 640\)",
    ),
    "next_norm_scale_integer": (
        "sandwich",
        {"next_norm_scale": spec(640, dtype=jnp.int8)},
        TypeError,
        "next_norm_scale must be bfloat16, float16 or float32, got int8",
    ),
    "next_norm_scale_mixed": (
        "sandwich",
        {"next_norm_scale": (SCALE, spec(640, dtype=F16))},
        TypeError,
        r"must not be mixed .* next_norm_scale\[1\] float16",
    ),
    "next_norm_scale_none": (
        "sandwich",
        {"next_norm_scale": None},
        TypeError,
        "next_norm_scale must be given; without a next norm use fused_post_ff",
    ),
    "no_next_norm_scales": (
        "moe_tail",
        {"next_norm_scale": ()},
        ValueError,
        r"next_norm_scale must be an array \[D\] or a tuple or list of 1 to 3, got 0",
    ),
    "four_next_norm_scales": (
        "sandwich",
        {"next_norm_scale": (SCALE,) * 4},
        ValueError,
        "or a tuple or list of 1 to 3, got 4",
    ),
    "norm_only_scale_shape": (
        "all_reduce_norm",
        {"norm_scale": spec(641)},
        ValueError,
        r"norm_scale must have the shape \(640,\) .* got \(641,\)",
    ),
    "norm_only_mixed": (
        "all_reduce_norm",
        {"norm_scale": spec(640, dtype=F16)},
        TypeError,
        "must not be mixed .* x bfloat16, norm_scale float16",
    ),
    "dense_scalar": (
        "moe_tail",
        {"dense": spec()},
        ValueError,
        r"dense must be \[\.\.\., D\], got the shape \(\)",
    ),
    "experts_shape": (
        "moe_tail",
        {"experts": spec(5, 640)},
        ValueError,
        r"experts must have dense's shape \(4, 640\), got \(5, 640\)",
    ),
    "experts_dtype": (
        "moe_tail",
        {"experts": spec(4, 640, dtype=F32)},
        TypeError,
        "dense and experts must have one dtype, got bfloat16 and float32",
    ),
    "moe_residual_shape": (
        "moe_tail",
        {"residual": spec(4, 641)},
        ValueError,
        r"residual must have dense's shape \(4, 640\), got \(4, 641\)",
    ),
    "dense_norm_scale_shape": (
        "moe_tail",
        {"dense_norm_scale": spec(4, 640)},
        ValueError,
        r"dense_norm_scale must have the shape \(640,\) for dense of shape",
    ),
    "expert_norm_scale_dtype": (
        "moe_tail",
        {"expert_norm_scale": spec(640, dtype=jnp.int32)},
        TypeError,
        "expert_norm_scale must be .* got int32",
    ),
    "moe_eps": ("moe_tail", {"eps": 0.0}, ValueError, "eps must be positive in float32, got 0"),
}


def trace(mesh, op="post_ff", specs=None, **arguments):
    """Traces one call without running it, with operands sharded by specs: partial sums, which get a
    leading axis of ranks, by P("tp"), and all others replicated, unless told otherwise."""
    arguments = {"axis_name": "tp"} | GOOD[op] | arguments
    operands = {name: arguments.pop(name) for name in OPERANDS & arguments.keys()}
    for name in operands.keys() & set(PARTIAL_SUMS):
        operands[name] = spec(2, *operands[name].shape, dtype=operands[name].dtype)
    in_specs = {name: P("tp") if name in PARTIAL_SUMS else P() for name in operands}
    in_specs |= specs or {}
    for name, spec_ in in_specs.items():  # an Explicit mesh wants types that say what is sharded
        place = operator.methodcaller("update", sharding=jax.NamedSharding(mesh, spec_))
        operands[name] = jax.tree.map(place, operands[name])

    def local(operands):
        one_rank = {name: a[0] if name in PARTIAL_SUMS else a for name, a in operands.items()}
        return getattr(jga, f"fused_{op}")(**one_rank, **arguments)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(in_specs,), out_specs=P())
    return jax.eval_shape(mapped, operands)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments_trace(mesh, op):
    expected = {"sandwich": (ROW, (ROW, ROW)), "moe_tail": (ROW, ROW)}
    assert trace(mesh, op) == expected.get(op, ROW)


@pytest.mark.parametrize("name", BAD)
def test_rejected(mesh, name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        trace(mesh, **arguments)


@pytest.mark.parametrize("name", BAD_OTHERS)
def test_others_reject(mesh, name):
    op, arguments, error, message = BAD_OTHERS[name]
    with pytest.raises(error, match=message):
        trace(mesh, op, **arguments)


SHAPES = [
    (),
    (1,),
    (640,),
    (641,),
    (0,),
    (4, 640),
    (1, 640),
    (640, 4),
    (4, 0),
    (0, 640),
    (2, 4, 640),
]
DTYPES = [BF16, F16, F32, jnp.int32, jnp.uint8, jnp.bool_, jnp.float8_e4m3fn, jnp.complex64]
OPTIONS = {
    "axis_name": ["tp", ("tp",), "model", (), None, 0, ["tp"]],
    "eps": [1e-6, 1, 0, -1.0, float("inf"), 1e-60, None, "1", 1j, np.float32(1e-5), [1e-6]],
    "scale_offset": [0.0, 1, -2.5, float("nan"), None, "0", 1e300, False],
    "implementation": [None, "xla", "CUDA", "", 0, True],
}


@st.composite
def arguments_of_any_kind(draw):
    """(operation, arguments): good ones, of which up to three are replaced by anything."""
    op = draw(st.sampled_from(list(GOOD)))
    specs = st.builds(
        lambda shape, dtype: spec(*shape, dtype=dtype),
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
    )
    arguments = {}
    for name in draw(st.lists(st.sampled_from([*GOOD[op], *OPTIONS]), max_size=3, unique=True)):
        if name in OPTIONS:
            arguments[name] = draw(st.sampled_from(OPTIONS[name]))
        elif name == "next_norm_scale":
            arguments[name] = draw(st.lists(specs, max_size=4).map(tuple) | specs)
        else:
            arguments[name] = draw(specs)
    return op, arguments


def is_good(op, arguments) -> bool:
    """The rules once more, as the docstrings have them."""
    arguments = GOOD[op] | arguments
    scales = [arguments[name] for name in arguments if name.endswith("norm_scale")]
    nexts = arguments.get("next_norm_scale", ())
    if isinstance(nexts, tuple):
        scales = [each for each in scales if each is not nexts] + list(nexts)
        if "next_norm_scale" in arguments and not 1 <= len(nexts) <= 3:
            return False
    sums = [arguments[name] for name in arguments if name in PARTIAL_SUMS]
    rows = sums + [arguments[name] for name in arguments if name == "residual"]
    scalars = [arguments[name] for name in arguments if name == "layer_scalar"]
    shape = sums[0].shape
    dtypes = {each.dtype for each in (*rows, *scales, *scalars)}
    return (
        len(shape) > 0
        and shape[-1] > 0
        and all(row.shape == shape for row in rows)
        and all(scale.shape == shape[-1:] for scale in scales)
        and all(scalar.shape in ((), (1,)) for scalar in scalars)
        and dtypes <= {jnp.dtype(t) for t in (BF16, F16, F32)}
        and not {jnp.dtype(BF16), jnp.dtype(F16)} <= dtypes
        and len({each.dtype for each in sums}) == 1
        and arguments.get("axis_name", "tp") in ("tp", ("tp",), ["tp"])
        and arguments.get("eps", 1e-6) in (1e-6, 1, np.float32(1e-5))
        and arguments.get("scale_offset", 0.0) in (0.0, 1, -2.5)
        and arguments.get("scale_offset", 0.0) is not False
        and arguments.get("implementation") in (None, "xla")
    )


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=arguments_of_any_kind())
def test_anything_is_traced_or_rejected(mesh, drawn):
    """ValueError or TypeError for whatever breaks a rule, and for nothing else."""
    op, arguments = drawn
    if is_good(op, arguments):
        trace(mesh, op, **arguments)
    else:
        with pytest.raises((ValueError, TypeError)):
            trace(mesh, op, **arguments)


def test_traced_eps(mesh):
    with pytest.raises(TypeError, match="eps must be a static number"):
        jax.eval_shape(lambda eps: trace(mesh, eps=eps), spec(dtype=F32))


def test_outside_shard_map():
    with pytest.raises(ValueError, match=r"^must be called inside jax\.shard_map"):
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


def test_vmap_axis_is_not_a_mesh_axis():
    with pytest.raises(
        ValueError, match=r"^must be called inside jax\.shard_map over axis_name, got 'batch'"
    ):
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


VARYING = [(op, name) for op in GOOD for name in GOOD[op] if name not in PARTIAL_SUMS]


@pytest.mark.parametrize(("op", "name"), VARYING)
def test_varying_operand(mesh, op, name):
    """All but the partial sums must be replicated over the axis."""
    doubled = {"residual": spec(8, 640), "layer_scalar": spec(2)}.get(name, spec(1280))
    with pytest.raises(ValueError, match=rf"{name} must be replicated over axis_name.*\['tp'\]"):
        trace(mesh, op, {name: P("tp")}, **{name: doubled})


def test_x_varying_over_one_of_two_axes(cpus):
    mesh = make_mesh((2, 2), ("a", "b"), cpus[:4])

    def local(x, residual, norm_scale):
        return jga.fused_post_ff(x[0], residual, norm_scale, axis_name=("a", "b"))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P())
    with pytest.raises(ValueError, match=r"over all of \['a', 'b'\], got one varying over \['a'\]"):
        jax.eval_shape(mapped, spec(2, 4, 640), spec(4, 640), spec(640))


SUMS = [(op, name) for op in GOOD for name in GOOD[op] if name in PARTIAL_SUMS]


@pytest.mark.parametrize(("op", "name"), SUMS)
def test_reduced_sum(mesh, op, name):
    """A replicated operand would be summed N times over."""
    with pytest.raises(ValueError, match=f"{name} must hold partial sums, varying or unreduced"):
        trace(mesh, op, {name: P()})


@pytest.mark.parametrize(("op", "name"), SUMS)
def test_unreduced_over_another_axis(cpus, op, name):
    """The operation reduces its own axes alone, so a sum must be unreduced over no other."""
    mesh = make_mesh((2, 2), ("data", "tp"), cpus[:4], AxisType.Explicit)
    with pytest.raises(ValueError, match=rf"{name} must be unreduced .* over \['data'\] too"):
        trace(mesh, op, {name: P(unreduced=frozenset({"data", "tp"}))})


@pytest.mark.parametrize("call", [jga.fused_moe_tail, jga.row_parallel_moe_tail])
def test_positional_scales_of_two_branches(call):
    """Positional scales could be swapped without an error."""
    with pytest.raises(TypeError, match="takes from 3 to 4 positional arguments but 6"):
        call(*[ROW] * 3, *[SCALE] * 3, axis_name="tp")


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
    with pytest.raises(
        ValueError, match=r"must be \[N, \.\.\., D\] each, with N = 2, 4 or 8 ranks"
    ):
        loopback_post_ff(jnp.ones((3, 4, 640)), jnp.ones((4, 640)), jnp.ones(640))
    with pytest.raises(
        ValueError, match=r"residual must have x's shape \(4, 640\), got \(5, 640\)"
    ):
        loopback_post_ff(jnp.ones((2, 4, 640)), jnp.ones((5, 640)), jnp.ones(640))
    sums, scale = (jnp.ones((2, 4, 640)), jnp.ones((4, 4, 640))), jnp.ones(640)
    with pytest.raises(ValueError, match=r"got the shapes \(2, 4, 640\), \(4, 4, 640\)"):
        loopback_tail(Operands(sums, (scale,) * 3, jnp.ones((4, 640))))


TOGETHER = r"local_ranks, axis_size and rendezvous must be given together.*got local_ranks="


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_ranks": (0, 1)}, TOGETHER),
        ({"axis_size": 2}, TOGETHER),
        ({"rendezvous": "directory"}, TOGETHER),
        ({"local_ranks": (0, 1), "axis_size": 4}, TOGETHER),
        ({"axis_size": 3}, "axis_size must be 2, 4 or 8.*got .*axis_size=3"),
        ({"axis_size": 0}, "axis_size must be 2, 4 or 8"),
        ({"local_ranks": (2, 4)}, "local_ranks must be ranks from 0 to 3.*got local_ranks=\\(2, 4"),
        ({"local_ranks": (-1, 0)}, "local_ranks must be ranks from 0 to 3"),
        ({"local_ranks": (1, 0)}, "local_ranks must be ranks.*rising"),
        ({"local_ranks": (1, 1)}, "local_ranks must be ranks.*each once"),
        ({"local_ranks": ()}, "local_ranks must be ranks from 0 to 3"),
        ({"local_ranks": (0,)}, r"must be \[1, \.\.\., D\] each.*got the shapes \(2, 4, 640\)"),
    ],
)
def test_loopback_rejects_processes(built, options, message):
    """At trace time, before a rank waits for others in vain."""
    if TOGETHER not in message:
        options = {"local_ranks": (0, 1), "axis_size": 4, "rendezvous": "directory"} | options
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(loopback_post_ff, **options), spec(2, 4, 640), ROW, SCALE)
