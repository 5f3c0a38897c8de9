"""Build the tests of the C++ kernels with sanitizers and run them; exits with the first code that is not 0.

    python tools/sanitize.py address,undefined

Needs a C++ compiler and CMake (from PATH, or the package cmake), no Python extension and no GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("score_test", "search_test")


def build_and_run(sanitizers: str, folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The finished run of each of TESTS; raises CalledProcessError where they can't be built."""
    cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    flags = f"-O1 -g1 -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer"
    configure = [
        *cmake,
        f"-S{ROOT}",
        f"-B{folder}",
        "-DCMAKE_BUILD_TYPE=None",
        "-DIOSR_FAST_MODULE=OFF",
        "-DIOSR_FAST_TESTS=ON",
        f"-DCMAKE_CXX_FLAGS={flags}",
    ]
    for command in (configure, [*cmake, "--build", str(folder), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return {test: subprocess.run([folder / test], check=False, capture_output=True, text=True) for test in TESTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", help="as for -fsanitize: address,undefined or thread")
    sanitizers = parser.parse_args().sanitizers
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = build_and_run(sanitizers, Path(folder))
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"{' and '.join(TESTS)} can't be built with -fsanitize={sanitizers}:\n{error.stdout}{error.stderr}"
            ) from error
    for test, done in runs.items():
        print(f"{test} -fsanitize={sanitizers}: {done.stdout}{done.stderr}", end="")
    raise SystemExit(next((done.returncode for done in runs.values() if done.returncode), 0))


if __name__ == "__main__":
    main()
