"""A fitted classifier as one ONNX graph: pixels.py, the encoder of an engine, answers.py and unknown.py."""
