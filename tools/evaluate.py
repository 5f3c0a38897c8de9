"""`iosr-fast evaluate` from the source tree."""

import sys

from iosr_fast.cli import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]], prog_name="iosr-fast")
