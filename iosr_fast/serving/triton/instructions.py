"""README.txt of a model repository: how to start a server on it and how to ask it. Triton reads folders only."""

from __future__ import annotations

from iosr_fast.serving.triton.configs import ENCODER, ENCODER_TRT, ENGINE_CACHE, ENSEMBLE, PREPROCESS, SCORING, Served

OLDEST_TRITON = "24.08"  # the first with ONNX Runtime 1.18, on which the graphs have been run


def readme(served: Served, top: int) -> str:
    shown = min(top, served.n_classes)
    volume = f" -v iosr_fast-tensorrt:{ENGINE_CACHE}" if served.gpu and not served.plans else ""
    encoder = ENCODER_TRT if served.plans else ENCODER
    stored = "" if served.exif_orientation else ", exif_orientation=False"
    text = f"""\
A few-shot classifier of iosr_fast, {served.n_classes} classes, as a model repository of NVIDIA Triton Inference Server.

{ENSEMBLE}: {PREPROCESS} -> {encoder} -> {SCORING}, up to {served.max_batch} pictures at once
  IMAGE          uint8 (B, height, width, 3), upright RGB; all pictures of a request have one size, which may be any
  LOGITS         float32 (B, {served.n_classes}), ZERO_SHOT + CACHE
  PROBABILITIES  float32 (B, {served.n_classes})
  ZERO_SHOT      float32 (B, {served.n_classes}), what the class names say
  CACHE          float32 (B, {served.n_classes}), what the support images add to it

Start a server (Triton {OLDEST_TRITON} or newer; TRITON_IMAGE is NVIDIA's tritonserver image), in this folder:

  docker run --rm {"--gpus all " if served.gpu else ""}-p 8000:8000 -p 8001:8001 -p 8002:8002 \\
    -v "$PWD":/models:ro{volume} "$TRITON_IMAGE" tritonserver --model-repository=/models

Ask it (pip install 'tritonclient[grpc]' iosr_fast); each answer is "value:index:label", best first:

  import numpy as np, tritonclient.grpc as triton
  from iosr_fast.images.preprocess import open_image  # upright 8-bit RGB, as this classifier was fit with

  picture = np.asarray(open_image("picture.jpg"{stored}))[None]
  image = triton.InferInput("IMAGE", picture.shape, "UINT8")
  image.set_data_from_numpy(picture)
  top = triton.InferRequestedOutput("PROBABILITIES", class_count={shown})
  answer = triton.InferenceServerClient("localhost:8001").infer("{ENSEMBLE}", [image], outputs=[top])
  print(answer.as_numpy("PROBABILITIES"))
"""
    if served.plans:
        text += f"""
{ENCODER_TRT} has TensorRT plans, for {" and for ".join(plan.told for plan in served.plans)}. The server needs
such a GPU and that TensorRT. Where it has others, name "{ENCODER}" in place of "{ENCODER_TRT}" in
{ENSEMBLE}/config.pbtxt and remove {ENCODER_TRT}.
"""
    elif served.gpu:
        text += """
The first start takes minutes: ONNX Runtime has TensorRT build engines for the GPU. The volume keeps them.
"""
    return text
