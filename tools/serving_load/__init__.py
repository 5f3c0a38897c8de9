"""Parts of tools/load_test.py."""
