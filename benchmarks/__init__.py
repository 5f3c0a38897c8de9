"""Benches of iosr_fast against named rivals, run by tools/benchmark.py; they are no part of the installed package."""
