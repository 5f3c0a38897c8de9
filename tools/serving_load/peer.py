"""infinity-emb, the server of embeddings that people use, in an environment of its own, and requests to it."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.serving_load import peer_model
from tools.serving_load.client import Queries
from tools.serving_load.server import ServerDied, ServerProcess

NAME, ENGINE = "infinity-emb", "torch"
PACKAGES = ("infinity-emb[server,torch,vision]==0.0.78", "aiohttp", "soundfile")
_INSTALLED = ".installed"
_MODEL = "clip"
_START_S = 300.0  # it imports every library that it supports
_MIN_COSINE = 0.999
# Nothing is downloaded, and nothing is reported.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
}


def make_environment(folder: Path) -> Path:
    """The python of a virtual environment with infinity-emb, which takes minutes to make. CalledProcessError of pip."""
    python = folder / "bin" / "python"
    if not (folder / _INSTALLED).exists():
        print(f"installing {' '.join(PACKAGES)} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / _INSTALLED).touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Of the packages that decide the peer's speed."""
    names = ("infinity-emb", "torch", "transformers", "pillow")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return dict(json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True).stdout))


def make_model(python: Path, folder: Path, pictures: list[Path]) -> np.ndarray:
    """Write the CLIP (peer_model.py); returns what transformers itself computes for the pictures, (N, D) float32."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    merges = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    command = [str(python), peer_model.__file__, str(folder), str(merges), *map(str, pictures)]
    subprocess.run(command, check=True, env={**os.environ, **_ENVIRONMENT}, stderr=subprocess.PIPE)
    return np.asarray(np.load(folder / "reference.npy", allow_pickle=False))


@dataclass(frozen=True)
class PeerQueries(Queries):
    """`images[i]` is the body of a request to /embeddings; `embeddings[i]` is transformers' own, of length 1."""

    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32), repr=False)
    content_type: str = "application/json"
    path: str = "/embeddings"

    def is_wrong(self, number: int, content: Any) -> bool:
        """Whether the cosine to transformers' embedding is below 0.999."""
        (row,) = content["data"]
        return not float(np.asarray(row["embedding"], np.float32) @ self.embeddings[number]) >= _MIN_COSINE


def make_peer_queries(images: list[bytes], embeddings: np.ndarray) -> PeerQueries:
    """JPEGs as infinity-emb takes them: a data URI in JSON."""
    bodies = [
        json.dumps({"model": _MODEL, "modality": "image", "input": [_data_uri(image)]}).encode() for image in images
    ]
    return PeerQueries(bodies, [], embeddings=embeddings)


def _data_uri(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


class PeerProcess(ServerProcess):
    """infinity-emb as its documentation starts it, on a free port."""

    def __init__(self, python: Path, model: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._free_port = int(probe.getsockname()[1])
        # A model without BetterTransformer and without its warm-up of texts: the load warms it up with pictures.
        options = f"--engine {ENGINE} --no-bettertransformer --device cpu --no-model-warmup --host 127.0.0.1"
        command = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(model), *options.split()]
        command += ["--served-model-name", _MODEL, "--port", str(self._free_port)]
        self._start(command, _ENVIRONMENT)

    def _wait_until_ready(self) -> int:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            self.check()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._free_port}/health", timeout=5):
                    return self._free_port
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise ServerDied(f"{NAME} was not ready within {_START_S:g} s:\n{self.log_text()[-2000:]}")
