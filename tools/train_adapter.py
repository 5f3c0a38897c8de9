"""`iosr-fast train-adapter` from the source tree."""

import sys

from iosr_fast.cli import app

if __name__ == "__main__":
    app(["train-adapter", *sys.argv[1:]], prog_name="iosr-fast")
