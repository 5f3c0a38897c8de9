"""From a CLIP to an engine folder, which needs no torch: `build` is the walk, over `onnx`, `quantize` and `check`.

`precision` says what embeddings depend on, `candidates` lists and builds engines in place of one, `text` exports the
text encoder, `pretrained` goes from a model's name to an opened engine. `one_file` joins an engine and a fitted method.
"""
