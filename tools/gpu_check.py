"""Everything that needs an NVIDIA GPU, on the machine's own Python: tests, parity, timings, into one JSON file.

    python tools/gpu_check.py --out benchmarks/results

Makes no environment and fetches nothing; what is missing is named and skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WANTED = (
    "torch",
    "triton",
    "open_clip",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "pytest",
    "hypothesis",
    "pybind11",
    "typer",
    "rich",
)


def run(command: list[str], limit_s: int, **environment: str) -> dict[str, Any]:
    """Exit code (None: it ran past the limit), seconds and the last lines of a command."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, said = None, f"stopped after {limit_s} s"
    return {
        "command": " ".join(["python" if word == sys.executable else word for word in command]),
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "last_lines": said.splitlines()[-15:],
    }


def build(result: dict[str, Any]) -> None:
    """The C++ module and, with nvcc, the CUDA module for this GPU's architecture, into the source tree."""
    if "pybind11" in result["missing"]:
        result["skipped"].append("both extensions: pybind11 is not installed")
        return
    import torch

    # The tree's metadata tells the package its version, which the extensions must match.
    result["metadata"] = run([sys.executable, "setup.py", "-q", "egg_info"], 30)
    cuda = shutil.which("nvcc") is not None
    if not cuda:
        result["skipped"].append("the CUDA module: nvcc is not on PATH")
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    arguments = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_ARCHITECTURES={architecture}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result["build"] = run(command, 150, IOSR_FAST_CUDA="1" if cuda else "0", CMAKE_ARGS=arguments)


def time_scoring(result: dict[str, Any]) -> None:
    """tools/benchmark.py score on the device, which verifies before it times."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "score.json"
        command = [
            sys.executable,
            "tools/benchmark.py",
            "score",
            "--device",
            "cuda",
            "--repeats",
            "20",
            "--json",
            str(rows),
        ]
        result["benchmark"] = run(command, 120)
        result["score"] = json.loads(rows.read_text()) if rows.exists() else []


def time_encoders(batch: int = 64, repeats: int = 20) -> list[dict[str, Any]]:
    """Fused against two passes in eager PyTorch, fp16, ViT-B/16 with random weights, verified before it is timed."""
    import torch

    from iosr_fast.offline.adapter import encode_adapted, encode_plain
    from iosr_fast.offline.clip import load_clip
    from iosr_fast.offline.dual_encoder import build_dual_encoder
    from iosr_fast.offline.export import random_adapter
    from tools.bench import harness

    clip = load_clip("ViT-B-16", "none")
    adapter = random_adapter(clip, 8)
    fused = build_dual_encoder(clip, adapter, "fp16").cuda()
    model, two = clip.model.cuda().half(), adapter.cuda().half()
    pixels = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device="cuda")
    mean, std = (torch.tensor(value, device="cuda").view(3, 1, 1) for value in (clip.mean, clip.std))
    floats = ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).half()
    assert next(model.parameters()).is_cuda

    def synced(function: Any) -> Any:
        def call() -> Any:
            with torch.inference_mode():
                out = function()
            torch.cuda.synchronize()
            return out

        return call

    candidates = {
        "fused": synced(lambda: fused(pixels)),
        "eager-two-pass": synced(lambda: (encode_plain(clip, floats), encode_adapted(clip, two, floats))),
    }
    for ours, theirs in zip(candidates["fused"](), candidates["eager-two-pass"](), strict=True):
        cosine = torch.nn.functional.cosine_similarity(ours.float(), theirs.float()).min().item()
        if cosine < 0.999:
            raise SystemExit(f"the fused encoder is wrong on this GPU: cosine {cosine:.5f} with the two passes")
    return harness.rows(
        "encoder",
        f"vit-b-16-b{batch}-s8",
        harness.measure(candidates, repeats, warmup=5),
        rivals=["eager-two-pass"],
        threads=1,
        precision="fp16",
        packages=("numpy", "torch"),
        device=torch.cuda.get_device_name(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    out = parser.parse_args().out
    missing = [name for name in WANTED if find_spec(name) is None]
    if "torch" in missing:
        raise SystemExit("gpu-check needs PyTorch with CUDA, and this Python has no torch")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu-check needs an NVIDIA GPU, and PyTorch sees none here; `make test` is for this machine")
    name = torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "missing": missing, "skipped": []}
    print(f"{name}, torch {torch.__version__}; not installed: {', '.join(missing) or 'nothing'}")
    build(result)
    if {"pytest", "hypothesis"} & set(missing):
        result["skipped"].append("the GPU tests: pytest or hypothesis is not installed")
    else:
        result["tests"] = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], 200)
    if {"typer", "rich"} & set(missing):
        result["skipped"].append("the scoring benchmark: typer or rich is not installed")
    else:
        time_scoring(result)
    if "open_clip" in missing:
        result["skipped"].append("the encoder's timings: open_clip is not installed")
    else:
        result["encoder"] = time_encoders()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for skipped in result["skipped"]:
        print(f"skipped {skipped}")
    print(f"wrote {path}")
    failed = [
        part
        for part in ("metadata", "build", "tests", "benchmark")
        if result.get(part, {}).get("exit_code", 0) not in (0, 5)
    ]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the JSON file has their last lines")


if __name__ == "__main__":
    main()
