"""The page of benchmarks: rows are read, then tables and figures are made from them. tools/report.py is its command."""
