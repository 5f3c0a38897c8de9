"""Triton kernels: cache_score scores a plan, dense_values sums value rows, compile_check compiles both without a GPU.

Importing this module needs neither Triton nor PyTorch nor a GPU; its submodules need Triton and PyTorch.
scoring.dispatch decides whether they can run.
"""
