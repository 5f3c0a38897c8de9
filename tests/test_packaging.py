"""What is installed: dependencies and extras, the pip commands in messages, the files of a wheel."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import iosr_fast
from iosr_fast.cli import app
from iosr_fast.encoders import engine_folder
from tests import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[Requirement]] = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()
}
SOURCES = [path for folder in ("iosr_fast", "kernels", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]


def requirements() -> list[Requirement]:
    """Of the core and of all extras, without the extras that name other extras."""
    groups = ([Requirement(line) for line in PROJECT["dependencies"]], *EXTRAS.values())
    return [each for group in groups for each in group if each.name != "iosr_fast"]


@functools.cache
def brings(extra: str) -> set[str]:
    """The distributions that `iosr_fast[extra]` installs, with what they ask for as far as they are installed here."""
    waiting, seen = [Requirement(line) for line in PROJECT["dependencies"]] + EXTRAS[extra], set()
    found: set[str] = set()
    while waiting:
        each = waiting.pop()
        if str(each) in seen or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        seen.add(str(each))
        if each.name == "iosr_fast":
            waiting += [line for name in each.extras for line in EXTRAS[name]]
            continue
        found.add(canonicalize_name(each.name))
        try:
            lines = requires(each.name) or []
        except PackageNotFoundError:
            continue
        for line in map(Requirement, lines):
            names = ["", *each.extras]
            if line.marker is None or any(line.marker.evaluate({"extra": name}) for name in names):
                line.marker = None
                waiting.append(line)
    return found


def calls_of_require() -> Iterator[tuple[str, str, str]]:
    """(file and line, module, extra or "") of every call of `require` and `require_installed`."""
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        loops = {
            node.target.id: ast.literal_eval(node.iter)
            for node in nodes
            if isinstance(node, ast.For | ast.comprehension)
            and isinstance(node.target, ast.Name)
            and isinstance(node.iter, ast.Tuple)
            and all(isinstance(each, ast.Constant) for each in node.iter.elts)
        }
        for node in nodes:
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("require", "require_installed"):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            module, extra = node.args if len(node.args) == 2 else (*node.args, ast.Constant(""))
            if ast.unparse(extra) == "EXTRAS[runtime]":  # the two TensorRTs
                yield from ((where, *row) for row in engine_folder.EXTRAS.items())
                continue
            modules = [module.value] if isinstance(module, ast.Constant) else loops[ast.unparse(module)]
            yield from ((where, name, ast.literal_eval(extra)) for name in modules)


def test_every_missing_package_is_answered_with_an_extra_that_brings_it() -> None:
    """Also a package that another one of the extra asks for, such as open_clip's regex."""
    homes = packages_distributions()
    names = {"pillow_heif": "pillow-heif", "google": "protobuf"}  # not installed everywhere; google is shared by many
    rows = list(calls_of_require())
    assert len(rows) > 60
    wrong = []
    for where, module, extra in rows:
        top = module.split(".")[0]
        wanted = {names[top]} if top in names else {canonicalize_name(name) for name in homes.get(top, [top])}
        if not wanted & (brings(extra) if extra else {canonicalize_name(top)}):
            wrong.append(f"{where}: {module} by [{extra}]")
    assert wrong == []


def test_every_extra_that_a_text_names_exists() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("Dockerfile*")]
    named = {
        (path.name, extra)
        for path in [*SOURCES, *pages]
        for extras in re.findall(r"(?:iosr_fast|\"\.|'\.)\[([a-z,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert len(named) > 5
    assert {(file, extra) for file, extra in named if extra not in EXTRAS} == set()


def test_the_core_asks_for_few_packages() -> None:
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert core == {"msgspec", "numpy", "pillow", "safetensors", "typer"}
    small = {"heic", "parquet", "ray", "sklearn", "tensorrt-rtx"}
    assert set(EXTRAS) == {"cpu", "gpu", "serve", "train", "all", "docs", "dev"} | small
    assert [entry.value for entry in entry_points(group="console_scripts", name="iosr-fast")] == ["iosr_fast.cli:app"]


def test_extras_bring_what_they_promise() -> None:
    assert not brings("serve") & {"torch", "open-clip-torch", "scikit-learn"}
    assert brings("cpu") >= brings("serve") | {"torch", "open-clip-torch", "onnxscript"}
    assert brings("serve") >= {"onnxruntime", "openvino"}
    assert brings("gpu") >= brings("cpu") | {"triton", "tensorrt"}
    everything = set.union(*(brings(extra) for extra in EXTRAS if extra not in ("docs", "dev")))
    assert brings("all") == everything


def test_what_is_used_beyond_its_promises_has_an_upper_bound() -> None:
    bounded = {each.name for each in requirements() if "<" in str(each.specifier)}
    assert bounded >= {"uvicorn", "open_clip_torch", "ray", "triton"}
    torch = next(each for each in requirements() if each.name == "torch")
    assert "2.5.1" not in torch.specifier, "before 2.6 torch.load runs code by default"


def test_constraints_are_versions_that_pyproject_allows() -> None:
    """No path, no local label like +cpu: the file holds on every machine. `make constraints` makes it."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    unpinned = {"torch", "torchvision", "triton", "tensorrt"}  # differ by platform
    for each in requirements():
        assert (each.name in unpinned) == (canonicalize_name(each.name) not in pinned), each
        assert each.name in unpinned or pinned[canonicalize_name(each.name)] in each.specifier, each


def test_every_folder_of_the_package_is_packaged() -> None:
    """find_packages skips a folder without __init__.py, and the wheel would then lack what an editable install has."""
    folders = {path.parent for path in (ROOT / "iosr_fast").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_data_file_is_packaged() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    homes = {name: ROOT / name.replace("iosr_fast.kernels", "kernels").replace(".", "/") for name in patterns}
    packaged = {path for name, home in homes.items() for pattern in patterns[name] for path in home.glob(pattern)}
    files = {path for room in ("iosr_fast", "kernels") for path in (ROOT / room).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc", ".so", ".pyd")} == packaged


@pytest.mark.slow
def test_without_a_compiler_all_but_the_extension_is_built(tmp_path: Path) -> None:
    """Unless it is required. A compiler that fails is an error always."""
    path, out = tmp_path / "bin", tmp_path / "out"
    path.mkdir()
    if cmake := shutil.which("cmake"):
        (path / "cmake").symlink_to(cmake)

    def build(**variables: str) -> tuple[int, str]:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", out, "--build-temp", out]
        environment = os.environ | {"IOSR_FAST_EXTENSION": "", "CMAKE_ARGS": ""} | variables
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, (done.stdout + done.stderr).strip()

    for make in (None, shutil.which("make") or ""):
        if make is not None:
            (path / "make").symlink_to(make)
        for required, status in (("", 0), ("required", 1)):
            returned, said = build(PATH=str(path), IOSR_FAST_EXTENSION=required)
            assert returned == status and "\n" not in said, said
            assert "no C++ compiler and make were found: install them (Debian: apt-get install build-essential" in said
        shutil.rmtree(out, ignore_errors=True)
    assert build(CXX=shutil.which("false") or "")[0] == 1
    assert not [*tmp_path.rglob("*.so")]


def test_the_command_prints_its_version() -> None:
    run = CliRunner().invoke(app, ["--version"])
    assert (run.exit_code, run.output) == (0, f"iosr-fast {iosr_fast.__version__}\n")
