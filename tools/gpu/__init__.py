"""The parts of tools/gpu_check.py: each runs in a process of its own, on the device that it is told, and notes results
as they come."""
