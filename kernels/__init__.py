"""Triton: affinity_sums scores batches on a GPU, compile_check compiles its kernel without one.

Importing this module needs neither Triton nor PyTorch nor a GPU; its submodules need Triton and PyTorch.
scoring.dispatch decides whether they can run.
"""
