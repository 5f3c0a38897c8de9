"""What `iosr-fast benchmark` runs: each file is one subject, harness.py times and reports them all alike."""
