"""INT8 and FP8 encoders: `encoder.quantize_onnx`."""
