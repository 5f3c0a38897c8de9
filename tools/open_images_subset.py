"""`iosr-fast open-images-subset` from the source tree."""

import sys

from iosr_fast.cli import app

if __name__ == "__main__":
    app(["open-images-subset", *sys.argv[1:]], prog_name="iosr-fast")
