"""From nothing to the first label, each time in a new process (cold_process.py).

    iosr-fast     Classifier.load, which checks every file's hash, and predict, in the runtime that "auto" chooses
    onnxruntime   the same in ONNX Runtime
    open-clip     the public way: import torch and open_clip, load the weights, encode twice, the papers' formula

The time is that of the whole process; peak memory is the process's own, mapped pages included: OpenVINO keeps the file
of the weights mapped. Private memory, at the end, is what no file backs and no other process shares. Files are in the
page cache, except on the first start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Candidate
from iosr_fast.classifier import Classifier
from iosr_fast.clip.adapter import Adapter, save_adapter
from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME, LoadedClip

CHILD = Path(__file__).with_name("cold_process.py")
FACTS = ("import_ms", "load_ms", "predict_ms", "peak_memory_mb", "private_memory_mb", "torch_imported")


def candidates(
    clip: LoadedClip, adapter: Adapter, classifier: Classifier, picture: Path, folder: Path
) -> dict[str, Candidate]:
    """Saves the classifier, and for open_clip its weights, adapter and arrays, in `folder`. All must give one label."""
    from safetensors.torch import save_file

    bundle = folder / "bundle"
    classifier.save(bundle)
    save_adapter(adapter, folder / "adapter.safetensors")
    weights = DEMO_FOLDER / "clip.safetensors"
    if clip.name != "demo":
        weights = folder / "clip.safetensors"
        save_file(clip.model.state_dict(), weights)
    plan = classifier.plan_
    assert plan.text is not None and plan.keys is not None and plan.class_offsets is not None
    np.savez(
        folder / "arrays.npz",
        text=plan.text,
        keys=plan.keys,
        shift=np.zeros(plan.width) if plan.reducer is None else plan.reducer.shift,
        onehot=np.repeat(np.eye(plan.n_classes, dtype=np.float32), np.diff(plan.class_offsets), axis=0),
        numbers=np.array([plan.tau, plan.alpha, plan.beta]),
    )
    name = DEMO_NAME if clip.name == "demo" else clip.name
    of_open_clip = (name, str(weights), str(folder / "adapter.safetensors"), str(folder / "arrays.npz"))
    ways = {
        "iosr-fast": ("iosr-fast", str(picture), str(bundle)),
        "onnxruntime": ("iosr-fast", str(picture), str(bundle), "onnxruntime"),
        "open-clip": ("open-clip", str(picture), *of_open_clip),
    }
    labels: dict[str, str] = {}
    classes = [str(name) for name in classifier.classes_]
    return {
        way: Candidate(
            partial(partial, start, *arguments), partial(check, way, classes, labels), rival=way != "iosr-fast"
        )
        for way, arguments in ways.items()
    }


def start(*arguments: str) -> dict[str, Any]:
    """The result of cold_process.py. Raises RuntimeError with its last line where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(CHILD), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"a cold start failed: {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(way: str, classes: list[str], labels: dict[str, str], result: Mapping[str, Any]) -> dict[str, Any]:
    """The phases and the memory; ArithmeticError unless all give one label, ours without importing PyTorch."""
    labels[way] = classes[result["label"]] if isinstance(result["label"], int) else result["label"]
    if len(set(labels.values())) > 1:
        raise ArithmeticError(f"the ways to a first label disagree: {labels}")
    if way != "open-clip" and result["torch_imported"]:
        raise ArithmeticError("PyTorch was imported, which it must run without")
    return {name: result[name] for name in FACTS}
