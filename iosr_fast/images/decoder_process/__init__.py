"""A process that decodes strangers' images and may be killed: what it runs (`child`), what confines it (`confinement`),
what it reads of files before it decodes them (`headers`, `structure`), and what is said to it (`wire`).

It imports NumPy and Pillow only, so that it starts fast. `iosr_fast.serving.batching.processes` starts and kills it.
"""
