"""tests/stress.py: short runs, and that it finds a wrong bit."""

import re

import jax
import numpy as np
import pytest

import stress
from helpers import children
from helpers.runners import make_mesh

FEW = ["--programs", "1", "--cases", "2", "--trips", "6", "--calls", "100"]
SHORT = ["--programs", "1", "--calls", "20000", "--seconds", "30"]
ON_CPUS = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}


def test_on_cpus():
    ended = children.run(stress.main, ["--mesh", *FEW], seconds=90, env=ON_CPUS).check()
    assert re.fullmatch(r"108 calls on 2 devices, no bit differs, \d+ calls/s\n", ended.stdout)


def with_a_wrong_bit() -> None:
    backend = stress.Backend(2, make_mesh((2,), ("tp",), jax.devices()), seed=0)
    program = stress.Program(backend, np.random.default_rng(0), cases=2, graphs=False)
    stacked, expected = program.operands
    wrong = np.array(expected[1][0])
    wrong.view(np.uint8).reshape(-1)[-1] ^= 1  # of the last set, the last token's last element
    program.operands = stacked, [expected[0], (jax.device_put(wrong), *expected[1][1:])]
    print(program.calls[1])
    program.run(0, 6)


def test_finds_a_wrong_bit():
    """Each of 6 trips compares each set once, on both ranks."""
    ended = children.run(with_a_wrong_bit, seconds=90, env=ON_CPUS)
    assert ended.status == 1
    assert ended.stderr.endswith(
        f"results that differ from the first ones\n12 times: {ended.stdout}"
    ), ended


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loopback(built, require_gpus, ranks):
    require_gpus(1)
    ended = children.run(stress.main, ["--ranks", str(ranks), *SHORT], seconds=110).check()
    assert "no bit differs" in ended.stdout


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_multi_gpu(built, require_gpus, ranks):
    require_gpus(ranks)
    arguments = ["--mesh", "--ranks", str(ranks), *SHORT]
    ended = children.run(stress.main, arguments, seconds=110).check()
    assert "no bit differs" in ended.stdout
