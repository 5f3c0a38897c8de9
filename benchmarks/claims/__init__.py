"""Measurements behind what the documentation claims, beside rivals: `python -m benchmarks.claims.NAME --help`."""
