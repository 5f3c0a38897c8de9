"""Pixels and class names to embeddings; runtimes/ executes a compiled encoder."""
