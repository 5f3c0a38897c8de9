"""One cold start, in its own process: from a bundle to the first label.

    python iosr_fast/benchmarks/cold_process.py iosr-fast BUNDLE PICTURE [RUNTIME]  # without PyTorch
    python iosr_fast/benchmarks/cold_process.py open-clip BUNDLE PICTURE MODEL WEIGHTS ADAPTER    # the public way

Prints one line of JSON: the label, seconds of importing, loading and predicting, the peak of resident memory, the
private memory at the end, and whether PyTorch was imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def with_iosr_fast(bundle: Path, picture: Path, runtime: str = "auto") -> tuple[str, float, float]:
    """The label, and the times at which importing and loading ended."""
    from iosr_fast import Classifier

    imported = time.perf_counter()
    classifier = Classifier.load(bundle, runtime)
    loaded = time.perf_counter()
    return str(classifier.predict(picture)[0]), imported, loaded


def with_open_clip(
    bundle: Path, picture: Path, model: str, weights: Path, adapter_path: Path
) -> tuple[str, float, float]:
    """The same classifier by open_clip's own model in eager PyTorch, encoded twice, and the papers' formula."""
    import open_clip
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from iosr_fast.clip.adapter import adapted_pass, load_adapter
    from iosr_fast.clip.load import DEMO_FOLDER, DEMO_NAME
    from iosr_fast.images.pixels import FORMATS

    imported = time.perf_counter()
    facts = json.loads((bundle / "manifest.json").read_bytes())
    if model == DEMO_NAME:
        open_clip.add_model_config(DEMO_FOLDER / f"{DEMO_NAME}.json")
    clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=str(weights))
    clip.eval()
    adapter, support = load_adapter(adapter_path), load_file(bundle / "support.safetensors")
    loaded = time.perf_counter()
    with torch.inference_mode():
        image = preprocess(Image.open(picture, formats=FORMATS).convert("RGB"))[None]
        features = clip.encode_image(image), adapted_pass(clip.visual, adapter, image)
        plain, adapted = (torch.nn.functional.normalize(feature, dim=-1) for feature in features)
        parameters = facts["parameters"]
        numbers = {number: c for c, number in enumerate(facts["class_numbers"])}
        one_hot = torch.nn.functional.one_hot(
            torch.tensor([numbers[int(owner)] for owner in support["owners"]]), len(numbers)
        ).float()
        affinity = torch.exp(-parameters["beta"] * (1 - adapted @ support["adapted"].T))
        logits = facts["tau"] * plain @ support["text"].T + parameters["alpha"] * affinity @ one_hot
        return str(facts["class_names"][int(logits.argmax())]), imported, loaded


def memory_mb(field: str) -> float | None:
    """A field of this process's /proc/self/status: VmHWM, the peak of resident memory, memory-mapped pages included;
    RssAnon, private memory. None outside Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        return None


def main(way: str, bundle: str, picture: str, *options: str) -> None:
    started = time.perf_counter()
    if way == "iosr-fast":
        label, imported, loaded = with_iosr_fast(Path(bundle), Path(picture), *options)
    else:
        model, weights, adapter = options
        label, imported, loaded = with_open_clip(Path(bundle), Path(picture), model, Path(weights), Path(adapter))
    predicted = time.perf_counter()
    print(
        json.dumps(
            {
                "label": label,
                "import_s": imported - started,
                "load_s": loaded - imported,
                "predict_s": predicted - loaded,
                "peak_memory_mb": memory_mb("VmHWM"),
                "private_memory_mb": memory_mb("RssAnon"),
                "torch_imported": "torch" in sys.modules,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
