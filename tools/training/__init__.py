"""Behind tools/train_adapter.py: its sources of pictures by name, and its progress bar."""
