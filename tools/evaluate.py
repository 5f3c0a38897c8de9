"""`iosr-fast evaluate` without an installation."""

from iosr_fast.cli.evaluate import main

if __name__ == "__main__":
    main()
