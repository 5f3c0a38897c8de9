"""What `iosr-fast evaluate` runs: tasks of a data set, every method on them, and tables, files and figures of it."""
