"""Triton kernels, imported as iosr_fast.kernels. Importing needs neither Triton nor a GPU."""
