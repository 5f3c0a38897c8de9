"""Folders with a manifest: written whole or not at all, hashed, and verified when they are read."""
