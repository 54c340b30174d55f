"""The README is finished, and its example runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_no_placeholder():
    assert not re.search(r"PLACEHOLDER|TODO|FIXME", README.read_text())


def test_readme_example():
    code, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # rmsnorm of equal entries is 1; (1 * 1 + 1) * 0.5
    assert result.stdout.startswith("[[1 1 1 ... 1 1 1]")
    assert result.stdout.endswith("platform is cpu, not CUDA\n")


def test_adopt_example():
    """Each way in docs/adopting.md; the script compares with float64."""
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "adopt.py"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "explicit",
        "automatic",
        "manual",
    ]


def test_hazards_are_covered():
    """Every row of docs/hazards.md says what covers it, and all that it names exists."""
    text = (ROOT / "docs" / "hazards.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 40
    files = [
        path
        for folder in ("tests", "ffi", "jax_gemma_arf")
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".cc", ".cu", ".cuh", ".h")
    ]
    source = "".join(path.read_text() for path in files)
    tests = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    names = {path.name for path in files} | {str(path.relative_to(ROOT)) for path in files}
    for number, _, here in rows:
        cited = re.findall(r"`(.+?)`", here)
        assert "design" in here or any(name in tests for name in cited), number
        for name in set(cited) - tests - names:
            known = not name.startswith("test_") and re.search(rf"\b{name}\b", source)
            assert known, f"row {number}: there is no {name}"
