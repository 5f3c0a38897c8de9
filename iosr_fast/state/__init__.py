"""A classifier as it runs: its immutable states, the changes from one to the next, and the log that keeps them."""
