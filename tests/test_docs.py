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


def test_hazards_name_real_tests():
    """Every test that docs/hazards.md cites exists, and every row says something."""
    text = (ROOT / "docs" / "hazards.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    cited = set(re.findall(r"`(test_\w+)`", text))
    assert cited <= set(re.findall(r"def (test_\w+)", source))
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 32))
