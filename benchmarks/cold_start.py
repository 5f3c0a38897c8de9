"""From nothing to the first label, each time in a new process.

    iosr-fast     Classifier.load, which checks every file's hash, and predict, in the runtime that "auto" chooses
    onnxruntime   the same in ONNX Runtime
    open-clip     the public way: import torch and open_clip, load the weights, encode twice, the papers' formula

The time is that of the whole process; peak memory is the process's own, mapped pages included: OpenVINO keeps the file
of the weights mapped. Private memory, at the end, is what no file backs and no other process shares. Files are in the
page cache, except on the first start.

`python -m benchmarks.cold_start WAY MODEL FOLDER PICTURE` is the new process, so nothing is imported before it has to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.harness import Candidate
    from iosr_fast.classifier import Classifier
    from iosr_fast.clip.adapter import Adapter
    from iosr_fast.clip.load import LoadedClip

RUNTIMES = {"iosr-fast": "auto", "onnxruntime": "onnxruntime"}
FACTS = ("import_ms", "load_ms", "predict_ms", "peak_memory_mb", "private_memory_mb", "torch_imported")


def candidates(
    clip: LoadedClip, adapter: Adapter, classifier: Classifier, picture: Path, folder: Path
) -> dict[str, Candidate]:
    """Saves the classifier, and for open_clip its weights, adapter and arrays, in `folder`. All must give one label."""
    import numpy as np
    from safetensors.torch import save_file

    from benchmarks.harness import Candidate, ready
    from benchmarks.papers import papers_arrays
    from iosr_fast.clip.adapter import save_adapter

    classifier.save(folder / "bundle")
    save_adapter(adapter, folder / "adapter.safetensors")
    save_file(clip.model.state_dict(), folder / "clip.safetensors")
    np.savez(folder / "arrays.npz", classes=np.array(classifier.classes_, str), **papers_arrays(classifier.plan_))
    labels: dict[str, str] = {}
    return {
        way: Candidate(
            ready(partial(start, way, clip.name, str(folder), str(picture))),
            partial(check, way, labels),
            rival=way != "iosr-fast",
        )
        for way in (*RUNTIMES, "open-clip")
    }


def start(*arguments: str) -> dict[str, Any]:
    """The result of a new process. Raises RuntimeError with its last line where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "benchmarks.cold_start", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"a cold start failed: {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(way: str, labels: dict[str, str], result: Mapping[str, Any]) -> dict[str, Any]:
    """The phases and the memory; ArithmeticError unless all give one label, ours without importing PyTorch."""
    labels[way] = result["label"]
    if len(set(labels.values())) > 1:
        raise ArithmeticError(f"the ways to a first label disagree: {labels}")
    if way in RUNTIMES and result["torch_imported"]:
        raise ArithmeticError("PyTorch was imported, which it must run without")
    return {name: result[name] for name in FACTS}


def with_iosr_fast(runtime: str, folder: Path, picture: str) -> tuple[str, float, float]:
    """The label, and the times at which importing and loading ended."""
    from iosr_fast import Classifier

    imported = time.perf_counter()
    classifier = Classifier.load(folder / "bundle", runtime)
    loaded = time.perf_counter()
    return str(classifier.predict(picture)[0]), imported, loaded


def with_open_clip(model: str, folder: Path, picture: str) -> tuple[str, float, float]:
    """The same classifier by open_clip's own model in eager PyTorch, encoded twice, and the papers' formula."""
    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from torch.nn.functional import normalize

    from benchmarks.papers import centred, papers_logits
    from iosr_fast.clip.adapter import adapted_pass, load_adapter
    from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME
    from iosr_fast.images.pixels import FORMATS

    imported = time.perf_counter()
    if model == "demo":
        open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")
        model = DEMO_NAME
    weights = str(folder / "clip.safetensors")
    clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=weights)
    clip.eval()
    adapter = load_adapter(folder / "adapter.safetensors")
    with np.load(folder / "arrays.npz") as file:
        classes, shift = file["classes"], torch.from_numpy(file["shift"])
        arrays = [torch.from_numpy(file[name]) for name in ("text", "keys", "onehot", "scales")]
    loaded = time.perf_counter()
    with torch.inference_mode():
        image = preprocess(Image.open(picture, formats=FORMATS).convert("RGB"))[None]
        plain = normalize(clip.encode_image(image), dim=-1)
        adapted = normalize(adapted_pass(clip.visual, adapter, image), dim=-1)
        logits = papers_logits(plain, centred(adapted, shift), *arrays)
    return str(classes[logits.argmax()]), imported, loaded


def memory_mb() -> dict[str, float | None]:
    """VmHWM, the peak of resident memory, memory-mapped pages included, and RssAnon, private memory, of this process;
    None outside Linux."""
    try:
        lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        status = {name: value.split()[0] for name, _, value in lines if value.strip()}
    except OSError:
        status = {}
    fields = {"peak_memory_mb": "VmHWM", "private_memory_mb": "RssAnon"}
    return {fact: round(int(status[name]) * 1024 / 1e6, 1) if name in status else None for fact, name in fields.items()}


def main(way: str, model: str, folder: str, picture: str) -> None:
    """Print one line of JSON: the label, and FACTS."""
    started = time.perf_counter()
    call = partial(with_iosr_fast, RUNTIMES[way]) if way in RUNTIMES else partial(with_open_clip, model)
    label, imported, loaded = call(Path(folder), picture)
    result = {
        "label": label,
        "import_ms": round((imported - started) * 1e3, 1),
        "load_ms": round((loaded - imported) * 1e3, 1),
        "predict_ms": round((time.perf_counter() - loaded) * 1e3, 1),
        **memory_mb(),
        "torch_imported": "torch" in sys.modules,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
