"""`python -m iosr_fast` is `iosr-fast`."""

from iosr_fast.cli import app

app(prog_name="iosr-fast")
