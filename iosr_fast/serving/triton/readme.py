"""The README.txt of a model repository."""

from __future__ import annotations

from iosr_fast.serving.triton import configs

OLDEST_TRITON = "24.08"  # the first with ONNX Runtime 1.18, on which the graphs have been run


def readme(served: configs.Served, top: int) -> str:
    """README.txt: how to start a server and send requests. Triton ignores this file."""
    shown = min(top, served.n_classes)
    volume = f" -v iosr_fast-tensorrt:{configs.ENGINE_CACHE}" if served.gpu and not served.plans else ""
    encoder = configs.ENCODER_TRT if served.plans else configs.ENCODER
    orientation = "" if served.exif_orientation else ", exif_orientation=False"
    steps, unknown = f"{configs.PREPROCESS} -> {encoder} -> {configs.SCORING}", ""
    if served.unknown_inputs:
        steps += f" and {configs.UNKNOWN}"
        unknown = f"""
  UNKNOWN_SCORE  float32 (B, 1); above {served.threshold:.6g}, the parameter unknown_threshold of {configs.ENSEMBLE},
                 a picture belongs to none of the classes; {served.keep:g} of pictures that do are below it"""
    text = f"""\
A few-shot classifier of iosr_fast, {served.n_classes} classes, as a model repository of NVIDIA Triton Inference Server.

{configs.ENSEMBLE}: {steps}, up to {served.max_batch} pictures at once
  IMAGE          uint8 (B, height, width, 3), upright RGB; all pictures of a request have one size, which may be any
  LOGITS         float32 (B, {served.n_classes}), ZERO_SHOT + CACHE
  PROBABILITIES  float32 (B, {served.n_classes})
  ZERO_SHOT      float32 (B, {served.n_classes}), the part of the class names
  CACHE          float32 (B, {served.n_classes}), the part of the support images{unknown}

Start a server (Triton {OLDEST_TRITON} or newer; TRITON_IMAGE is NVIDIA's tritonserver image), in this folder:

  docker run --rm {"--gpus all " if served.gpu else ""}-p 8000:8000 -p 8001:8001 -p 8002:8002 \\
    -v "$PWD":/models:ro{volume} "$TRITON_IMAGE" tritonserver --model-repository=/models

Send requests (pip install 'tritonclient[grpc]' iosr_fast); each answer is "value:index:label", best first:

  import numpy as np, tritonclient.grpc as triton
  from iosr_fast.images.preprocess import open_image  # upright 8-bit RGB, as this classifier was fit with

  picture = np.asarray(open_image("picture.jpg"{orientation}))[None]
  image = triton.InferInput("IMAGE", picture.shape, "UINT8")
  image.set_data_from_numpy(picture)
  top = triton.InferRequestedOutput("PROBABILITIES", class_count={shown})
  answer = triton.InferenceServerClient("localhost:8001").infer("{configs.ENSEMBLE}", [image], outputs=[top])
  print(answer.as_numpy("PROBABILITIES"))
"""
    if served.plans:
        text += f"""
{encoder} has TensorRT plans, for {" and for ".join(plan.description for plan in served.plans)}. The server needs
such a GPU and that TensorRT. With others, name "{configs.ENCODER}" in place of "{configs.ENCODER_TRT}" in
{configs.ENSEMBLE}/config.pbtxt and remove {configs.ENCODER_TRT}.
"""
    elif served.gpu:
        text += """
The first start takes minutes, because ONNX Runtime lets TensorRT build engines for the GPU. The volume keeps them.
"""
    return text
