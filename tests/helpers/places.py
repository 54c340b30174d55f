"""Where programs run that hold several calls: loopback or a mesh, behind one interface."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from helpers.cases import Case, Inputs, make_inputs
from helpers.runners import call_op, in_specs, make_mesh, mesh_call, one_rank, place
from jax_gemma_arf._src.operands import Operands
from jax_gemma_arf.loopback import loopback_tail

# As many calls to a CUDA graph as can be, also where nothing else stands between them.
GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": "1",
}
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where calls run: a mesh of GPUs, or None for loopback with `ranks` ranks."""

    ranks: int
    mesh: jax.sharding.Mesh | None = None

    def inputs(self, case: Case) -> Inputs:
        inputs = make_inputs(case, self.ranks)
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, inputs)
        return place(self.mesh, inputs, in_specs(case))

    def step(self, case: Case, inputs: Inputs) -> Inputs:
        """One call: hidden is the next step's residual. To be used in `program`."""
        if self.mesh is None:
            return inputs._replace(residual=loopback_tail(Operands(*inputs))[0][-1])
        hidden, *_ = call_op(case, inputs, axis_name="tp", implementation="cuda")
        return inputs._replace(residual=hidden)

    def program(self, case: Case, body: Callable[[Inputs], Inputs]) -> Callable:
        """From inputs to the residual after body."""
        if self.mesh is None:
            return lambda inputs: body(inputs).residual
        return jax.shard_map(
            lambda inputs: body(one_rank(inputs)).residual,
            mesh=self.mesh,
            in_specs=(in_specs(case),),
            out_specs=P(),
        )

    def call(self, case: Case) -> Callable:
        """One call: from inputs to what every rank holds of hidden and the next norms."""
        if self.mesh is None:
            return lambda inputs: loopback_tail(Operands(*inputs))
        return mesh_call(case, self.mesh, implementation="cuda", out_specs=P("tp"), every_rank=True)


def gpu_mesh(devices) -> jax.sharding.Mesh:
    return make_mesh((len(devices),), ("tp",), devices)


def bits_differ(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns whether any bit differs, on the device."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[one.dtype.itemsize]
    cast = functools.partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jnp.any(cast(one) != cast(other))


def same_bits(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        bits = [array.view(np.uint8) for array in np.atleast_1d(a, b)]
        np.testing.assert_array_equal(*bits)
