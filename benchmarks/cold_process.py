"""One cold start: a picture to its label by one of two ways, in this process. Imports nothing before it has to.

    python benchmarks/cold_process.py iosr-fast PICTURE BUNDLE [RUNTIME]
    python benchmarks/cold_process.py open-clip PICTURE MODEL WEIGHTS ADAPTER ARRAYS

Prints one line of JSON: the label (or its number), milliseconds of importing, loading and predicting, the peak of
resident memory, the private memory at the end, and whether PyTorch was imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def with_iosr_fast(picture: str, bundle: str, runtime: str = "auto") -> tuple[str, float, float]:
    """The label, and the times at which importing and loading ended."""
    from iosr_fast import Classifier

    imported = time.perf_counter()
    classifier = Classifier.load(bundle, runtime)
    loaded = time.perf_counter()
    return str(classifier.predict(picture)[0]), imported, loaded


def with_open_clip(picture: str, model: str, weights: str, adapter_path: str, arrays: str) -> tuple[int, float, float]:
    """The same classifier by open_clip's own model in eager PyTorch, encoded twice, and the papers' formula."""
    import numpy as np
    import open_clip
    import torch
    from PIL import Image
    from torch.nn.functional import normalize

    from iosr_fast.clip.adapter import adapted_pass, load_adapter
    from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME
    from iosr_fast.images.pixels import FORMATS

    imported = time.perf_counter()
    if model == DEMO_NAME:
        open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")
    clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=weights)
    clip.eval()
    adapter = load_adapter(adapter_path)
    with np.load(arrays) as file:
        text, keys, shift, onehot, numbers = (
            torch.from_numpy(file[name]).float() for name in ("text", "keys", "shift", "onehot", "numbers")
        )
    tau, alpha, beta = numbers.tolist()
    loaded = time.perf_counter()
    with torch.inference_mode():
        image = preprocess(Image.open(picture, formats=FORMATS).convert("RGB"))[None]
        plain = normalize(clip.encode_image(image), dim=-1)
        adapted = normalize(adapted_pass(clip.visual, adapter, image), dim=-1)
        affinity = torch.exp(-beta * (1 - normalize(adapted - shift, dim=-1) @ keys.T))
        return int((tau * plain @ text.T + alpha * affinity @ onehot).argmax()), imported, loaded


def memory_mb(field: str) -> float | None:
    """A field of this process's /proc/self/status: VmHWM, the peak of resident memory, memory-mapped pages included;
    RssAnon, private memory. None outside Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = int(next(line for line in lines if line.startswith(field)).split()[1])
    except (OSError, StopIteration):
        return None
    return round(kilobytes * 1024 / 1e6, 1)


def main(way: str, *arguments: str) -> None:
    started = time.perf_counter()
    label, imported, loaded = (with_iosr_fast if way == "iosr-fast" else with_open_clip)(*arguments)
    result = {
        "label": label,
        "import_ms": round((imported - started) * 1e3, 1),
        "load_ms": round((loaded - imported) * 1e3, 1),
        "predict_ms": round((time.perf_counter() - loaded) * 1e3, 1),
        "peak_memory_mb": memory_mb("VmHWM"),
        "private_memory_mb": memory_mb("RssAnon"),
        "torch_imported": "torch" in sys.modules,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
