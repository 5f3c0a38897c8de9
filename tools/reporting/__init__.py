"""The page of benchmarks: rows read, tables and figures made from them. tools/report.py is its command."""
