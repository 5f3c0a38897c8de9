"""An image encoder that reads no texts, small enough to build its engine in a second."""

from __future__ import annotations

from pathlib import Path

import torch

from iosr_fast.backbones.load import LoadedModel
from iosr_fast.encoders.opened_model import OpenedModel
from iosr_fast.encoders.runtimes import open_engine
from iosr_fast.export.build import write_engine
from iosr_fast.export.source import source_of
from iosr_fast.images.geometry import Geometry

IMAGE_SIZE, IMAGE_WIDTH = 32, 48


class Convolutions(torch.nn.Module):
    """Random weights; `visual` maps normalised pixels (B, 3, S, S) to features (B, D), as of every LoadedModel."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Conv2d(3, 12, 4, 4), torch.nn.ReLU(), torch.nn.Conv2d(12, 12, 3, 2, 1), torch.nn.GELU()]
        self.visual = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())


def image_model(seed: int = 1) -> LoadedModel:
    """It as it is loaded; another seed is another encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Convolutions().eval().requires_grad_(False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return LoadedModel(model, None, "small-images", Geometry(IMAGE_SIZE), mean, std, 100.0, f"{seed:064x}")


def open_image_model(folder: Path, seed: int = 1) -> OpenedModel:
    """It as a Classifier opens it (Classifier._with_clip), in ONNX Runtime; writes its engine to `folder`."""
    model = image_model(seed)
    write_engine(source_of(model), folder, "onnxruntime", max_batch=8)
    encoder = open_engine(folder, "onnxruntime")
    return OpenedModel(encoder, folder, None, model.logit_scale, (model, None), reads_text=False)
