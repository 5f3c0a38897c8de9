"""`iosr-fast benchmark` from the source tree; make gpu-check runs it where nothing is installed."""

import sys

from iosr_fast.cli import app
from tools.source_tree import use_source_tree

if __name__ == "__main__":
    use_source_tree()
    app(["benchmark", *sys.argv[1:]], prog_name="iosr-fast")
