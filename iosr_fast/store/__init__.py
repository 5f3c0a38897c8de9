"""How heads follow one another: changes, the log of changes, and bundles."""
