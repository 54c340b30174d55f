"""The two forms of the routed experts (integrations/_gemma_experts.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_gemma_arf.integrations import _gemma_experts

EXPERTS, WIDTH, HIDDEN = 8, 32, 16


def operands(choices: np.ndarray) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    tokens = len(choices)
    shapes = [(tokens, WIDTH), (tokens, EXPERTS), (EXPERTS, 2, HIDDEN, WIDTH)]
    shapes += [(EXPERTS, HIDDEN, WIDTH), (EXPERTS,)]
    x, weights, gating, linear, scale = (
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes)
    )
    return x, jnp.asarray(choices), weights, gating, linear, scale


def by_loop(x, choices, weights, gating, linear, scale) -> np.ndarray:
    """One token and one expert at a time, in float64."""
    x, weights, gating, linear, scale = (
        np.asarray(a, np.float64) for a in (x, weights, gating, linear, scale)
    )
    out = np.zeros_like(x)
    for token, experts in enumerate(np.asarray(choices)):
        for expert in experts:
            gate, up = gating[expert] @ x[token]
            gelu = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
            factor = weights[token, expert] * scale[expert]
            out[token] += factor * ((gelu * up) @ linear[expert])
    return out


@pytest.mark.parametrize("run", [_gemma_experts.chosen_experts, _gemma_experts.every_expert])
@pytest.mark.parametrize(
    "choices",
    [[[5, 2]], [[7, 0], [0, 7], [3, 7]], [[4, 1]] * 4],
    ids=["one token", "shared experts", "equal tokens"],
)
def test_forms_of_experts(run, choices):
    arguments = operands(np.array(choices))
    out = jax.jit(run)(*arguments)
    np.testing.assert_allclose(out, by_loop(*arguments), rtol=2e-4, atol=2e-4)


def test_order():
    keys = jnp.array([3, 1, 3, 0, 1])
    order, place = _gemma_experts._order(keys)
    np.testing.assert_array_equal(order, [3, 1, 4, 0, 2])
    np.testing.assert_array_equal(order[place], range(5))
