"""make gpu-bundle: what a GPU machine without a network needs beside the source tree, in one folder, build/gpu-bundle.

    site/       packages that the machine may lack, for its Python, and iosr_fast's metadata
    modules/    iosr_fast._C and _C_cuda for its Python
    bundle.json what is in it, and for which Python

make gpu-check takes it from there; nothing is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from iosr_fast.exceptions import IosrFastError
from iosr_fast.utils.provenance import commit

FOLDER = Path("build") / "gpu-bundle"
# open_clip with what it imports that machines with PyTorch may lack, and what iosr_fast itself needs.
PACKAGES = ("open_clip_torch", "ftfy", "wcwidth", "timm", "msgspec")
BUILD_NEEDS = ("setuptools", "pybind11", "cmake", "ninja")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LARGEST_BYTES = 20e6
FACTS = "bundle.json"


def make(root: Path, version: str = "3.12", python: str | None = None, architectures: str = "80-real;90") -> Path:
    """Collect the bundle of a source tree for Python `version` ("3.12") on x86-64 Linux; its folder.

    The modules are built by `python`, an interpreter of that version with its headers (None: one that is found on PATH
    or among pyenv's); without one they are left out, and make gpu-check builds them on the machine. `architectures` are
    CMake's, for _C_cuda, which takes nvcc. Raises IosrFastError for an interpreter of another version and for a bundle
    over 20 MB, CalledProcessError if pip or the build fails.
    """
    if python is not None and (got := _version_of(python)) != version:
        raise IosrFastError(f"expected a Python {version} to build modules with, got {python}, which is {got}")
    python = python or _find(version)
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "modules").mkdir(parents=True)
    _install(root, folder / "site", version)
    left_out = []
    if python is None:
        left_out.append(f"extension modules: no python{version} is found; make gpu-check builds them on the machine")
    else:
        left_out += _build(root, folder, python, architectures)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    facts: dict[str, Any] = {
        "python": version,
        "commit": commit(),
        "bytes": size,
        "packages": sorted(path.name.removesuffix(".dist-info") for path in (folder / "site").glob("*.dist-info")),
        "modules": sorted(path.name for path in (folder / "modules").iterdir()),
        "left_out": left_out,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for line in left_out:
        print(f"left out: {line}")
    if size > LARGEST_BYTES:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise IosrFastError(
            f"expected a bundle of at most {LARGEST_BYTES / 1e6:.0f} MB, got {size / 1e6:.1f}; the largest file is "
            f"{largest.relative_to(folder)}; name fewer architectures"
        )
    return folder


_VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"


def _version_of(python: str) -> str:
    """ "3.12" of an interpreter, or "no Python that runs"."""
    try:
        done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=False)
    except OSError:
        return "no Python that runs"
    return done.stdout.strip() if done.returncode == 0 else "no Python that runs"


def _find(version: str) -> str | None:
    """An interpreter of that version: on PATH, where a shim of pyenv may not run, or among pyenv's."""
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}"), reverse=True)
    there = shutil.which(f"python{version}")
    places = [*([there] if there else []), *map(str, installed)]
    return next((python for python in places if _version_of(python) == version), None)


def _install(root: Path, site: Path, version: str) -> None:
    """PACKAGES in the versions of constraints.txt, for that Python, whatever Python runs this."""
    tag = f"cp{version.replace('.', '')}"
    target = ["--python-version", version, "--implementation", "cp", "--abi", tag, "--abi", "none"]
    target += [option for name in PLATFORMS for option in ("--platform", name)]
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", *options, *target, "--constraint", "constraints.txt", *PACKAGES]
    subprocess.run(command, check=True, cwd=root)
    shutil.rmtree(site / "bin", ignore_errors=True)
    _write_metadata(root, site)


def _write_metadata(root: Path, site: Path) -> None:
    """iosr_fast's name and version, which importlib.metadata reads."""
    import tomllib

    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    folder = site / f"iosr_fast-{version}.dist-info"
    folder.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: iosr_fast\nVersion: {version}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")


def _build(root: Path, folder: Path, python: str, architectures: str) -> list[str]:
    """Build both modules in an environment of their own; what was left out."""
    nvcc = shutil.which("nvcc")
    with tempfile.TemporaryDirectory(prefix="iosr-fast-gpu-bundle-") as temporary:
        environment = Path(temporary) / "environment"
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
        own = str(environment / "bin" / "python")
        pip = [own, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", "constraints.txt", *BUILD_NEEDS]
        subprocess.run(pip, check=True, cwd=root)
        build = Path(temporary) / "build"
        command = [
            own,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            str(build),
            "--build-temp",
            f"{temporary}/objects",
        ]
        variables = {**os.environ, "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        variables |= {"IOSR_FAST_CUDA": "0"} if nvcc is None else {"IOSR_FAST_CUDA": "1", "CUDACXX": nvcc}
        arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES='{architectures}'"
        subprocess.run(command, check=True, cwd=root, env={**variables, "CMAKE_ARGS": arguments.strip()})
        for module in build.rglob("_C*.so"):
            shutil.copy(module, folder / "modules")
    return [] if nvcc else ["_C_cuda: nvcc is not on PATH; make gpu-check builds it on the machine"]


def read(root: Path) -> dict[str, Any] | None:
    """bundle.json of a source tree, or None without a bundle."""
    try:
        facts: dict[str, Any] = json.loads((root / FOLDER / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return facts


def import_path(root: Path) -> list[str]:
    """The folder of the bundle's packages, if there is a bundle and it is for this Python."""
    facts = read(root)
    return [str(root / FOLDER / "site")] if facts is not None and facts["python"] == _this_python() else []


def use(root: Path) -> dict[str, Any]:
    """Copy the bundle's modules into the source tree if they are for this Python and newer than what is there; the
    bundle's facts, with "used"."""
    facts = read(root)
    if facts is None:
        print("left out: the bundle: make gpu-bundle has not made one; what this machine lacks is missing")
        return {"used": False}
    if not import_path(root):
        print(f"left out: the bundle: it is for Python {facts['python']}, and this is {_this_python()}")
        return {**facts, "used": False}
    for module in (root / FOLDER / "modules").iterdir():
        there = root / "iosr_fast" / module.name
        if not there.exists() or there.stat().st_mtime < module.stat().st_mtime:
            shutil.copy(module, there)
    return {**facts, "used": True}


def _this_python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
