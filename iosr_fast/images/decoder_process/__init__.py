"""A process that decodes images from untrusted sources and may be killed: its loop (`child`), its resource limits
(`confinement`), what it may do (`sandbox`), and the messages (`wire`).

It imports NumPy and Pillow only, so that it starts fast. `iosr_fast.serving.batching.decoder` starts and kills it.
"""
