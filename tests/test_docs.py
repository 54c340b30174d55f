"""The README is finished, and its example runs as printed."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import jax_gemma_arf as jga
from helpers import children
from helpers.runners import check_docstring_example
from jax_gemma_arf import linen

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_no_placeholder():
    assert not re.search(r"PLACEHOLDER|TODO|FIXME", README.read_text())


def test_readme_example():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "shard_map" in block)
    result = children.python("-c", code, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2").check()
    # rmsnorm of equal entries is 1; (1 * 1 + 1) * 0.5
    assert result.stdout.startswith("[[1 1 1 ... 1 1 1]")
    assert result.stdout.endswith("platform is cpu, not CUDA\n")


def test_adopt_example():
    """Each way in docs/adopting.md; the script compares with float64."""
    result = children.python(ROOT / "examples" / "adopt.py", JAX_PLATFORMS="cpu").check()
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "explicit",
        "automatic",
        "manual",
    ]


ADOPTING = re.findall(
    r"(<!-- not run: .+ -->\n)?```python\n(.*?)```",
    (ROOT / "docs" / "adopting.md").read_text(),
    re.DOTALL,
)


@pytest.mark.parametrize("code", [code for not_run, code in ADOPTING if not not_run])
def test_adopting_snippets(code):
    """Each runs alone, unless the page says why it cannot."""
    for module in set(re.findall(r"from (tunix)", code)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: the extra of pyproject.toml")
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    result = children.python("-W", "ignore", "-c", code, **environment).check()
    if "audit" in code:
        gather, reduction = "kind='all-gather', shapes=((256, 256),)", "kind='all-reduce', shapes="
        assert f"[Collective({gather}), Collective({reduction}((2, 8, 256),))]" in result.stdout


def test_hazards_are_covered():
    """Every row of docs/hazards.md says what covers it, and all that it names exists."""
    text = (ROOT / "docs" / "hazards.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 40
    files = [
        path
        for folder in ("tests", "ffi", "jax_gemma_arf")
        for path in (ROOT / folder).rglob("*")
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


WITH_EXAMPLES = (
    jga.fused_post_ff,
    jga.fused_sandwich,
    jga.fused_all_reduce_norm,
    jga.fused_moe_tail,
    jga.down_proj_post_ff,
    jga.fusion_support,
    linen.FeedForward,
)


@pytest.mark.parametrize("documented", WITH_EXAMPLES, ids=lambda documented: documented.__name__)
def test_docstring_example(documented, mesh):
    check_docstring_example(documented, jga=jga, linen=linen, mesh=mesh)


@pytest.fixture(scope="module")
def slot_protocol(tmp_path_factory):
    """The compiled introduction to ffi/."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc in PATH")
    program = tmp_path_factory.mktemp("slot_protocol") / "slot_protocol"
    source = ROOT / "examples" / "slot_protocol.cu"
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    subprocess.run(["nvcc", "-arch=sm_90", *strict, source, "-o", program], check=True)
    return program


def test_slot_protocol_compiles(slot_protocol):
    assert slot_protocol.stat().st_size > 0


def test_slot_protocol_in_loopback(slot_protocol, require_gpus):
    """It checks its own result."""
    require_gpus(1)
    result = subprocess.run([slot_protocol], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith(": right\n")


# The rules of CONTRIBUTING.md that a pattern can find.
UNCLEAR = re.compile(
    r'"""(What|Of|As|Those|Whether)\b|\bso many\b|\bfor ever\b|\bone\'s own\b'
    r"|\b(that|those) of\b"
)
WRITTEN = {".py", ".pyi", ".md", ".sh", ".cc", ".cu", ".cuh", ".h"}


def test_plain_words():
    """Docstrings start with a verb or a noun; a count has a name."""
    folders = ("bench", "docs", "examples", "ffi", "jax_gemma_arf", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*files, *ROOT.glob("*.md"))
        if path.suffix in WRITTEN and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNCLEAR.search(line)
    ]
    assert not found, "see CONTRIBUTING.md, Code and words:\n" + "\n".join(found)
