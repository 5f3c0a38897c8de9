"""Bytes to pixels: files, arrays and tensors to RGB, decoders, and what a folder holds."""
