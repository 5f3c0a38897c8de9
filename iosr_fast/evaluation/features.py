"""Feature files: embeddings and labels of a support set for each number of shots, of validation and of test images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from iosr_fast.encoders.encoder import Embeddings, unit
from iosr_fast.evaluation import demo
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.methods.support_set import make_support_set

TAU = 100.0
SUPPORT = re.compile(r"support(\d+)_[xy]")
Arrays = Mapping[str, np.ndarray]


def open_sources(
    words: Sequence[str], shots: Sequence[int] | None = None, seeds: int | None = None, use_text: bool = True
) -> list[TaskSource]:
    """A TaskSource for each path of a feature file; the word `demo` stands for the demo's pictures (demo.py).

    Raises IosrFastError and OSError as read_features, and for sets of one name, which the tables can't tell apart.
    """
    sources = []
    for word in words:
        if word == demo.NAME and not use_text:
            raise IosrFastError("expected feature files with --no-text, got demo")
        if word == demo.NAME:
            sources.append(demo.open_demo(shots or demo.SHOTS, seeds or demo.SEEDS))
        else:
            sources.append(read_features(word, shots, seeds or 1, use_text))
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise IosrFastError(f"expected data sets of different names, got {', '.join(twice)} more than once; rename one")
    return sources


def read_features(
    path: str | Path, shots: Sequence[int] | None = None, seeds: int = 1, use_text: bool = True
) -> TaskSource:
    """A TaskSource from an .npz file, with all its numbers of shots if `shots` is None.

    With one of `seeds` its support sets are those of the file. With more, each draws its images from the largest one,
    seeds 0, 1, ...; the shots are then fewer than that one has. `use_text` False leaves text out.

    support{k}_x (N, D) and _y (N,) for k shots, test_x and _y; optional: val_x and _y, text (C, D), tau (default 100),
    and adapted embeddings as _xa beside every _x that is used. Rows are L2-normalised again, in float32.

    Raises FileNotFoundError, and ValueError if an array is missing, has another shape, isn't finite or names no class.
    """
    path = Path(path)
    arrays = _load(path)
    available = sorted({int(match[1]) for match in map(SUPPORT.fullmatch, arrays) if match})
    if not available:
        raise IosrFastError(f"expected arrays support1_x, support1_y and so on in {path}, got {sorted(arrays)}")
    largest = available[-1]
    wanted = tuple(dict.fromkeys(shots or (available if seeds == 1 else available[:-1])))
    if seeds > 1 and (not wanted or max(wanted) >= largest):
        raise IosrFastError(f"expected --shots below {largest} with --seeds: support sets are drawn from that one")
    if seeds == 1 and (missing := [k for k in wanted if k not in available]):
        raise IosrFastError(f"expected --shots out of {available}, which {path} holds, got {missing}")
    parts = (
        [f"support{k}" for k in (wanted if seeds == 1 else [largest])]
        + ["test"]
        + (["val"] if "val_x" in arrays or "val_y" in arrays else [])
    )
    text = _unit("text", arrays) if use_text and "text" in arrays else None
    width = (_unit("test_x", arrays) if text is None else text).shape[1]
    adapted = [f"{part}_xa" for part in parts if f"{part}_xa" in arrays]
    if adapted and len(adapted) < len(parts):
        raise IosrFastError(f"expected adapted embeddings for every part or for none, got only {', '.join(adapted)}")
    embeddings = {
        part: Embeddings(_unit(f"{part}_x", arrays, width), _unit(f"{part}_xa", arrays, width) if adapted else None)
        for part in parts
    }
    supports = [_array(f"{part}_y", arrays) for part in parts if part.startswith("support")]
    n_classes = len(text) if text is not None else 1 + max(int(labels.max(initial=-1)) for labels in supports)
    labels = {part: _labels(f"{part}_y", arrays, len(embeddings[part]), n_classes) for part in parts}
    tau = float(arrays["tau"]) if "tau" in arrays and arrays["tau"].ndim == 0 else TAU
    if not (np.isfinite(tau) and tau > 0):
        raise IosrFastError(f"expected tau finite and above 0 in {path}, got {tau}")

    def draw(k: int, seed: int) -> Task:
        part = f"support{k if seeds == 1 else largest}"
        rows = np.arange(len(labels[part])) if seeds == 1 else _drawn(labels[part], k, seed)
        support = make_support_set(embeddings[part][rows], labels[part][rows], text, tau, n_classes)
        validation = (embeddings["val"], labels["val"]) if "val" in embeddings else None
        return Task(support, embeddings["test"], labels["test"], validation)

    name = path.name if use_text or "text" not in arrays else f"{path.name}, without texts"
    return TaskSource(name, wanted, tuple(range(seeds)), draw)


def _drawn(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` images of each class, or of all that it has."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate([order[labels[order] == c][:shots] for c in np.unique(labels)])


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no feature file at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, BadZipFile, EOFError, AttributeError) as error:
        raise IosrFastError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _array(name: str, arrays: Arrays) -> np.ndarray:
    if name not in arrays:
        raise IosrFastError(f"expected an array {name}, got {', '.join(sorted(arrays))}")
    return arrays[name]


def _unit(name: str, arrays: Arrays, width: int | None = None) -> np.ndarray:
    """The rows, L2-normalised, float32; `width` is that of the other embeddings."""
    array = _array(name, arrays)
    if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.floating):
        raise IosrFastError(
            f"expected {name} of shape (N, D), N and D at least 1, of floats; got {array.shape} of {array.dtype}"
        )
    if width not in (None, array.shape[1]):
        raise IosrFastError(
            f"expected {name} of shape (N, {width}), as wide as the other embeddings, got {array.shape}"
        )
    if not np.isfinite(array).all() or not array.any(axis=1).all():
        raise IosrFastError(f"expected {name} of finite rows other than zero, got NaN, infinite or zero ones")
    return unit(array)


def _labels(name: str, arrays: Arrays, count: int, n_classes: int) -> np.ndarray:
    array = _array(name, arrays)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise IosrFastError(f"expected {name} of shape ({count},) of integers, got {array.shape} of {array.dtype}")
    if array.min() < 0 or array.max() >= n_classes:
        raise IosrFastError(f"expected {name} in 0..{n_classes - 1}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)
