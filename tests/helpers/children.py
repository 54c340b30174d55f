"""Functions of the tests in processes of their own, with a bound on their time: for faults that
take a process or its GPU with them, and for jobs of several processes."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1]
# After this number of seconds a child ends itself, should the test that started it be gone.
ALARM = 300


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    stdout: str
    stderr: str

    def check(self) -> "Ended":
        assert self.status == 0, f"status {self.status}\n{self.stdout}\n{self.stderr}"
        return self


class Child:
    """One call of a module's function in a process of its own.

    Args:
      function: at the top level of a module in tests/.
      *arguments: with a repr that is Python.
      env: environment variables to add.
    """

    def __init__(self, function: Callable, *arguments, env: dict[str, str] | None = None):
        module = Path(function.__code__.co_filename).stem
        code = (
            f"import signal; signal.alarm({ALARM}); "
            f"import {module}; {module}.{function.__name__}(*{arguments!r})"
        )
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],  # -P: the installed package, not this tree
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **(env or {}),
            },
            stdout=self._files[0],
            stderr=self._files[1],
        )

    def end(self) -> Ended:
        """Kills it if it runs still."""
        self.process.kill()
        status = self.process.wait()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(status, *texts)


def python(*arguments: Any, **environment: str) -> Ended:
    """Runs Python with these arguments, and environment variables besides, to its end."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(result.returncode, result.stdout, result.stderr)


def run(function: Callable, *arguments, seconds: float, **options) -> Ended:
    """Runs one child to its end; AssertionError if it takes longer."""
    return run_together([Child(function, *arguments, **options)], seconds=seconds)[0]


def run_together(children: list[Child], *, seconds: float, grace: float = 15) -> list[Ended]:
    """Waits for all of them; AssertionError if one takes longer.

    When one fails the others, which may wait for it, have `grace` seconds to end.
    """
    deadline = time.monotonic() + seconds
    failed = False
    while time.monotonic() < deadline:
        statuses = [child.process.poll() for child in children]
        if None not in statuses:
            break
        if not failed and any(statuses):
            failed = True
            deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.02)
    late = [i for i, child in enumerate(children) if child.process.poll() is None]
    ended = [child.end() for child in children]
    report = "\n".join(f"process {i}: {child}" for i, child in enumerate(ended))
    assert not late, f"processes {late} did not end in time\n{report}"
    return ended


def run_job(
    function: Callable, *arguments, seconds: float, env: Sequence[dict[str, str]] = ({}, {})
) -> list[Ended]:
    """Runs function(address for jax.distributed.initialize, index, *arguments) in two processes.

    env: environment variables to add, for each of them.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [Child(function, address, i, *arguments, env=of_one) for i, of_one in enumerate(env)]
    return run_together(pair, seconds=seconds)
