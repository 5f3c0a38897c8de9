"""Build the test of the C++ kernels with sanitizers and run it; exits with its code.

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
TEST = "scoring_test"


def build(sanitizers: str, folder: Path) -> None:
    """Build TEST in `folder`. Raises CalledProcessError if that fails."""
    cmake = [shutil.which("cmake")] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    flags = f"-Og -g1 -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", help="as for -fsanitize: address,undefined or thread")
    sanitizers = parser.parse_args().sanitizers
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(sanitizers, Path(folder))
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"{TEST} can't be built with -fsanitize={sanitizers}:\n{error.stdout}{error.stderr}"
            ) from error
        print(f"{TEST} -fsanitize={sanitizers}: ", end="", flush=True)
        code = subprocess.run([Path(folder) / TEST], check=False).returncode
    raise SystemExit(code)


if __name__ == "__main__":
    main()
