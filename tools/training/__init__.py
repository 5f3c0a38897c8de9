"""What tools/train_adapter.py runs: its sources of pictures by name, and its progress bar."""
