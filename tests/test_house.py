"""What holds for the package as a whole: what an import costs, what stays out."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import iosr_fast
from tests import ROOT
from tests.interpreter import printed
from tests.unsafe_code import runs_what_it_reads

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def modules_after(statement: str, cwd: Path) -> set[str]:
    """Top-level modules that are loaded after `statement` in a fresh interpreter."""
    loaded = "{name.split('.')[0] for name, module in sys.modules.items() if module is not None}"
    code = f"{statement}; import json, sys; print(json.dumps(sorted({loaded})))"
    return set(json.loads(printed(code, cwd=cwd).splitlines()[-1]))


def third_party(modules: set[str]) -> set[str]:
    # Finders of editable installs are loaded by the interpreter itself, before any statement.
    return {name for name in modules - set(sys.stdlib_module_names) if not name.startswith("_")}


def test_importing_the_package_loads_nothing_else(tmp_path: Path) -> None:
    extra = third_party(modules_after("import iosr_fast", tmp_path)) - third_party(modules_after("pass", tmp_path))
    assert extra == {"iosr_fast"}


def test_scoring_needs_numpy_only(tmp_path: Path) -> None:
    statement = "import iosr_fast; iosr_fast.score; iosr_fast.ScoringPlan; iosr_fast.Embeddings"
    extra = third_party(modules_after(statement, tmp_path)) - third_party(modules_after("pass", tmp_path))
    assert extra == {"iosr_fast", "numpy"}


@pytest.mark.parametrize("where", ["elsewhere", "root"])
def test_kernels_are_found_from_anywhere(where: str, tmp_path: Path) -> None:
    loaded = modules_after("import iosr_fast.kernels, iosr_fast._C", ROOT if where == "root" else tmp_path)
    assert "iosr_fast" in loaded
    assert not loaded & {"triton", "torch"}


def test_what_needs_torch_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from iosr_fast.scoring.device_plan import device_plan\n"
        "from iosr_fast.scoring.plan import ScoringPlan\n"
        "device_plan(ScoringPlan(1, text=[[1.0]]), 'cpu')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0
    assert "torch is needed here and is not installed: pip install 'iosr_fast[cpu]' brings it" in run.stderr


def test_names_are_lazy_and_complete() -> None:
    assert iosr_fast.__version__ == PYPROJECT["project"]["version"]
    assert set(iosr_fast.__all__) <= set(dir(iosr_fast))
    for name in set(iosr_fast.__all__) - {"__version__"}:
        assert getattr(iosr_fast, name).__module__.startswith("iosr_fast.")
    with pytest.raises(AttributeError, match="no attribute 'classify'; it has Classifier"):
        iosr_fast.classify  # noqa: B018


def test_pillow_opens_a_fixed_list_of_formats() -> None:
    """Without `formats` it starts whatever decoder fits a file's first bytes, Ghostscript for an EPS among them."""
    opening = re.compile(
        r"\bImage\.open\((?![^()]*(?:\([^()]*\)[^()]*)*\bformats=)|from PIL\.Image import[^\n]*\bopen\b"
    )
    sources = [path for folder in ("iosr_fast", "tools") for path in (ROOT / folder).rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources}
    assert [name for name, text in texts.items() if opening.search(text)] == []
    assert sum("Image.open(" in text for text in texts.values()) >= 3, "the search finds what it looks for"


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Nothing that is read is run: no pickle, no program, no archive member that picks its own path."""
    sources = [path for folder in ("iosr_fast", "kernels", "tools") for path in (ROOT / folder).rglob("*.py")]
    hits = [
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if runs_what_it_reads(node)
    ]
    # The bytes of that archive have the SHA-256 that OpenAI published: tests/backbones/test_load.py.
    assert hits == ["iosr_fast/backbones/load.py: torch.jit.load(archive, map_location='cpu')"]


UNSAFE_LINES = """import pickle
from pickle import loads
torch.load(path)
torch.load(path, weights_only=False)
np.load(path, allow_pickle=True)
torch.jit.load(path)
tar.extractall(folder)
exec(code)
eval(text)
shutil.unpack_archive(path)
subprocess.run(line, shell=True)
yaml.load(text)
os.system(line)"""


@pytest.mark.parametrize("line", UNSAFE_LINES.splitlines())
def test_an_unsafe_line_is_found(line: str) -> None:
    assert any(runs_what_it_reads(node) for node in ast.walk(ast.parse(line)))
