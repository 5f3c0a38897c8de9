"""A fitted classifier as one ONNX graph: `graph` joins `pixels`, the encoder of an engine, `logits` and `unknown`."""
