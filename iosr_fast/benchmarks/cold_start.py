"""Cold start: from nothing to the first label, each time in a new process.

    iosr-fast         Classifier.load, which checks every file's hash, and predict, in the runtime that "auto" chooses
    onnxruntime       the same in ONNX Runtime
    weights-in-graph  as iosr-fast, the encoder's weights inside encoder.onnx, as one protobuf, and not beside it
    open-clip         the public way: import torch and open_clip, load the weights, encode twice, the papers' formula

The time is that of the whole process, from its start to its line with the label; peak memory is the process's own,
mapped pages included: OpenVINO keeps the file of the weights mapped. Private memory, at the end, is what no file backs
and no other process shares. Files are in the page cache, except on the first start. All must give the same label before
anything is timed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from iosr_fast.benchmarks import harness
from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME, load_clip
from iosr_fast.encoders.runtimes.onnxruntime import FILE, PLAIN_FILE, WEIGHTS
from iosr_fast.export.pretrained import DEMO_ADAPTER
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.manifest import MANIFEST, OWN_FIELDS, write_manifest

RIVALS = ("onnxruntime", "weights-in-graph", "open-clip")
CHILD = Path(__file__).with_name("cold_process.py")
CLASSES, SHOTS = 20, 4
PEAK_FACTOR, PEAK_ROOM_MB = 1.3, 150  # the goal: at most 1.3 times the weights and 150 MB


def run(model: str, repeats: int = 5) -> list[dict[str, Any]]:
    """Verify and time one model, interleaved; one row an implementation."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_in(Path(folder), model, repeats)


def _run_in(folder: Path, model: str, repeats: int) -> list[dict[str, Any]]:
    picture = make_bundle(model, folder)
    bundle = folder / "bundle"
    weights_mb = (bundle / "engine" / WEIGHTS).stat().st_size / 1e6
    copy_bundle(bundle, folder / "weights-in-graph", put_weights_into_graph)
    if model == "demo":
        rival = DEMO_NAME, str(DEMO_FOLDER / "clip.safetensors"), str(DEMO_ADAPTER)
    else:
        rival = model, str(folder / "clip.safetensors"), str(folder / "adapter.safetensors")
    commands = {
        "iosr-fast": ("iosr-fast", str(bundle), str(picture)),
        "onnxruntime": ("iosr-fast", str(bundle), str(picture), "onnxruntime"),
        "weights-in-graph": ("iosr-fast", str(folder / "weights-in-graph"), str(picture)),
        "open-clip": ("open-clip", str(bundle), str(picture), *rival),
    }
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}

    def start(name: str) -> None:
        results[name].append(cold_start(*commands[name]))

    candidates = {name: partial(start, name) for name in commands}
    for call in candidates.values():
        call()
    verify(results)
    runtimes_ms = harness.measure(candidates, repeats, bursts=False)
    limit_mb = PEAK_FACTOR * weights_mb + PEAK_ROOM_MB
    return harness.rows(
        "cold-start",
        model.lower(),
        runtimes_ms,
        rivals=RIVALS,
        threads=usable_threads(),
        packages=("numpy", "openvino", "onnxruntime", "torch", "open_clip_torch"),
        extra={name: _facts(starts[-repeats:], weights_mb, limit_mb) for name, starts in results.items()},
    )


def _facts(starts: list[dict[str, Any]], weights_mb: float, limit_mb: float) -> dict[str, Any]:
    phases = ("import_s", "load_s", "predict_s")
    peaks = [start["peak_memory_mb"] for start in starts]
    private = [start["private_memory_mb"] for start in starts]
    return {
        **{f"{phase[:-2]}_ms": round(statistics.median(start[phase] for start in starts) * 1e3, 1) for phase in phases},
        "peak_memory_mb": None if None in peaks else round(max(peaks), 1),
        "private_memory_mb": None if None in private else round(max(private), 1),
        "peak_memory_goal_mb": round(limit_mb, 1),
        "weights_mb": round(weights_mb, 1),
        "torch_imported": starts[0]["torch_imported"],
    }


def cold_start(*arguments: str) -> dict[str, Any]:
    """The result of cold_process.py. Raises RuntimeError with its last line where it fails."""
    done = subprocess.run([sys.executable, str(CHILD), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a cold start failed: {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def verify(results: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ArithmeticError unless all give one label, ours without importing PyTorch."""
    labels = {name: starts[0]["label"] for name, starts in results.items()}
    if len(set(labels.values())) > 1:
        raise ArithmeticError(f"the ways to a first label disagree: {labels}; not timed")
    if wrong := [name for name in results if name != "open-clip" and results[name][0]["torch_imported"]]:
        raise ArithmeticError(f"PyTorch was imported by {wrong}, which must run without it; not timed")


def make_bundle(model: str, folder: Path) -> Path:
    """A saved Tip-Adapter++ of the demo's pictures in folder/bundle, and a JPEG to classify, whose path is returned;
    weights for open_clip in folder/clip.safetensors and folder/adapter.safetensors, which the demo has of its own.

    Any model but the demo has random weights, and an adapter in its last third: they cost what trained ones cost.
    """
    from PIL import Image

    from iosr_fast.classifier import Classifier
    from iosr_fast.evaluation.demo_bundle import held_out_queries, make_demo_bundle
    from iosr_fast.export.export import random_adapter, write_engine

    queries, _ = held_out_queries(CLASSES, SHOTS)
    picture = folder / "picture.jpg"
    Image.fromarray(queries[0]).resize((500, 500), Image.Resampling.BICUBIC).save(picture, quality=90)
    if model == "demo":
        make_demo_bundle(folder / "bundle", CLASSES, SHOTS)
        return picture
    from safetensors.torch import save_file

    from iosr_fast.clip.adapter import save_adapter
    from iosr_fast.clip.vision_tower import vision_tower

    clip = load_clip(model, "none")
    adapter = random_adapter(clip, 2 * len(vision_tower(clip.model.visual, model).blocks) // 3)
    save_file(clip.model.state_dict(), folder / "clip.safetensors")
    save_adapter(adapter, folder / "adapter.safetensors")
    write_engine(clip, adapter, folder / "engine", "onnxruntime")
    images = queries[: CLASSES * 2]
    names = [f"thing {c}" for c in range(CLASSES)]
    classifier = Classifier(
        model,
        "none",
        engine=folder / "engine",
        runtime="onnxruntime",
        method="tip-adapter++",
        alpha=100.0,
        beta=5.5,
        views=1,
    )
    labels = [names[i % CLASSES] for i in range(len(images))]
    classifier.fit(images, labels, class_names=names).save(folder / "bundle")
    return picture


def copy_bundle(bundle: Path, out: Path, change: Callable[[Path], None]) -> None:
    """The bundle with another encoder.onnx, which `change` makes in the copy of its engine folder."""
    shutil.copytree(bundle, out)
    change(out / "engine")
    for folder, kind in ((out / "engine", "engine"), (out, "classifier")):
        facts = json.loads((folder / MANIFEST).read_bytes())
        (folder / MANIFEST).unlink()
        fields = {name: value for name, value in facts.items() if name not in OWN_FIELDS}
        write_manifest(folder, kind, fields)


def put_weights_into_graph(engine: Path) -> None:
    import onnx

    model = onnx.load(str(engine / FILE))
    (engine / WEIGHTS).unlink()
    (engine / PLAIN_FILE).unlink(missing_ok=True)  # its weights are in the same file
    onnx.save(model, str(engine / FILE))
