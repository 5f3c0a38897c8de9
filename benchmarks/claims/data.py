"""The data sets that promises are measured on: pictures in bursts, feature files, scenes of several labels, trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from scipy.cluster.hierarchy import fcluster, ward

from iosr_fast import Classifier, Embeddings, labelled_images
from iosr_fast.backbones.demo.pictures import POOL, held_out, load_index, load_pictures, only
from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.encoders.encoder import unit
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.evaluation.features import TAU, open_sources
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.export.pretrained import choose_adapter
from iosr_fast.head.labels import read_label_sets
from iosr_fast.images.preprocess import to_pixels
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.methods.tree import Path as TreePath

BURST, RECENT = 4, 250  # variants of a picture in a burst, at four images a class two; pictures of a calibration
SIBLINGS, OTHERS = "calibrated on siblings", "calibrated on others"
CONCEPTS, STYLES, ROWS, COLUMNS, SIDE = 100, 7, 4, 6, 64
PHOTOGRAPHS = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field moon page rocket"
MOST, COPIES, QUERIES, BATCH = 4, 3, 8, 64  # embeddings of a scene; copies of it; test images of a concept


@dataclass(frozen=True)
class DataSet:
    """S pictures with labels (S,); `images` have `variants` of each, one after another. `train` (S,) bool are those of
    which support may be; None: any."""

    name: str
    images: Embeddings
    labels: np.ndarray
    text: np.ndarray | None = None
    tau: float = TAU
    variants: int = 1
    train: np.ndarray | None = None


@dataclass(frozen=True)
class Cell(Task):
    """A task, and what its row is of: how its support is calibrated or left out, a number of dimensions, or nothing."""

    of: str = ""
    paths: tuple[TreePath, ...] | None = None


@dataclass(frozen=True)
class LabelSets:
    """Support images with labels `members` (N, C) bool, and test images with labels (B, C) bool; `groups` where it is
    known which images are one scene."""

    support: Embeddings
    members: np.ndarray
    queries: Embeddings
    labels: np.ndarray
    text: np.ndarray | None = None
    tau: float = TAU
    groups: np.ndarray | None = None
    of: str = ""


def opened(word: str) -> list[DataSet]:
    """Bursts of pictures, a file as it is split, a feature file, and if it has texts, the same without, or the demo."""
    if word in PICTURES:
        return [PICTURES[word]()]
    if Path(word).is_file():
        with np.load(word, allow_pickle=False) as file:
            if "split" in file.files:
                images, name = Embeddings(unit(file["x"])), f"{Path(word).name}, as split"
                return [DataSet(name, images, file["y"], train=file["split"] == "train")]
    alone = [] if word == "demo" else open_sources([word], use_text=False)
    both = {source.name: source for source in (*open_sources([word]), *alone)}
    return [pooled(source) for source in both.values()]


def pooled(source: TaskSource) -> DataSet:
    """The validation and test images of a data set, with its texts."""
    task = source.draw(max(source.shots), 0)
    images, labels = zip((task.queries, task.labels), *filter(None, [task.validation]), strict=True)
    texts = task.support.text, task.support.tau
    return DataSet(source.name, Embeddings.concatenate(images), np.concatenate(labels), *texts)


def projected(data: DataSet, width: int) -> DataSet:
    """The same by a random Gaussian projection of images and texts, at unit length."""
    matrix = np.random.default_rng(0).standard_normal((data.images.plain.shape[1], width)).astype(np.float32)
    text = None if data.text is None else unit(data.text @ matrix)
    return replace(data, images=Embeddings(unit(data.images.plain @ matrix)), text=text)


def drawn(
    data: DataSet,
    shots: Sequence[int],
    seeds: Sequence[int],
    of: str = "",
    paths: tuple[TreePath, ...] | None = None,
) -> TaskSource:
    """Support images are bursts of variants of the same picture; the first variants of other pictures are the test. Of
    a data set as it is split, support is half of the training images, and the test all others.

    Validation images are, by `of`, none, SIBLINGS, as many further variants of the support's pictures, or the other
    half of the training images, or OTHERS, bursts of RECENT of the other pictures, at most half of them, which are not
    in the test then.
    """
    labels, classes = data.labels, range(data.labels.max() + 1)

    def taken(pictures: np.ndarray, first: int, count: int) -> tuple[Embeddings, np.ndarray]:
        rows = (data.variants * pictures[:, None] + first + np.arange(count)).ravel()
        return data.images[rows], np.repeat(labels[pictures], count)

    def draw(k: int, seed: int) -> Cell:
        rng = np.random.default_rng(seed)
        order, burst = rng.permutation(len(labels)), min(BURST, data.variants, max(k // 2, 1))
        if data.train is None:
            chosen = np.concatenate([order[labels[order] == c][: k // burst] for c in classes])
            siblings, others = (chosen, burst, burst), np.setdiff1d(order, chosen)
        else:
            train, others = order[data.train[order]], order[~data.train[order]]
            of_class = [train[labels[train] == c] for c in classes]
            chosen, rest = (np.concatenate([pictures[half::2] for pictures in of_class]) for half in (0, 1))
            siblings = rest, 0, 1
        validation = taken(*siblings) if of == SIBLINGS else None
        if of == OTHERS:
            recent, others = np.split(rng.permutation(others), [min(RECENT, len(others) // 2)])
            validation = taken(recent, 0, burst)
        support = make_support_set(*taken(chosen, 0, burst), data.text, data.tau, len(classes))
        return Cell(support, *taken(others, 0, 1), validation, of, paths)

    return TaskSource(data.name, tuple(shots), tuple(seeds), draw)


def drawings() -> DataSet:
    """Variants of concepts that are drawn in all styles."""
    pictures = load_pictures("held-out", min_styles=STYLES)
    pictures = only(pictures, np.arange(len(pictures.names)) < CONCEPTS)
    clip = load_clip("demo")
    texts = embed_classes(clip, pictures.names), clip.logit_scale
    return DataSet("drawings", bursts(pictures.images), pictures.concepts, *texts, 2 * BURST)


def photographs() -> DataSet:
    """Variants of the tiles of photographs; each photograph is a class."""
    from skimage import data

    named = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS.split()]
    rows = np.stack([np.asarray(one.resize((COLUMNS * SIDE, ROWS * SIDE))) for one in named])
    tiles = rows.reshape(-1, ROWS, SIDE, COLUMNS, SIDE, 3).swapaxes(2, 3).reshape(-1, SIDE, SIDE, 3)
    labels = np.repeat(np.arange(len(named)), ROWS * COLUMNS)
    return DataSet("photographs", bursts(tiles), labels, variants=2 * BURST)


PICTURES = {"drawings": drawings, "photographs": photographs}


def bursts(pictures: np.ndarray) -> Embeddings:
    """Plain embeddings of 2 * BURST variants of each picture, one after another."""
    rng, run = np.random.default_rng(0), torch_encoder(load_clip("demo"), None)
    images = np.stack([variant(picture, rng) for picture in pictures for _ in range(2 * BURST)])
    return Embeddings(np.concatenate([run(part).plain for part in np.array_split(images, len(images) // 100)]))


def variant(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture turned by up to 15 degrees, with 80 to 100% of its sides, and as much as a third lighter or darker."""
    image = Image.fromarray(picture).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    size = image.width * rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, image.width - size, 2)
    crop = image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + size, top + size))
    return np.asarray(ImageEnhance.Brightness(crop).enhance(rng.uniform(0.67, 1.33)))


def pasted(shots: Sequence[int], seeds: Sequence[int]) -> TaskSource:
    """The demo as a data set of images with two labels each; each seed has other concepts."""
    clip, every = load_clip("demo"), held_out()[0]
    run = torch_encoder(clip, choose_adapter(clip, "auto"))

    def draw(k: int, seed: int) -> LabelSets:
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(every.names))[:CONCEPTS]
        pictures = only(every, np.isin(np.arange(len(every.names)), chosen))
        rows = [rng.permutation(np.flatnonzero(pictures.concepts == c)) for c in range(CONCEPTS)]
        tests, test_labels = paste_pairs(pictures.images, [r[POOL:] for r in rows], QUERIES, rng)
        images, members = paste_pairs(pictures.images, [r[:POOL] for r in rows], k, rng)
        text = embed_classes(clip, pictures.names)
        return LabelSets(run(images), members, run(tests), test_labels, text, clip.logit_scale)

    return TaskSource("demo, two to an image", tuple(shots), tuple(seeds), draw)


def paste_pairs(pictures: np.ndarray, rows: Sequence[np.ndarray], times: int, rng: Any) -> tuple[np.ndarray, ...]:
    """Images (times * C / 2, S, S, 3) uint8 and labels (times * C / 2, C) bool: each of C concepts is in `times`
    images, left or right of a random other one. `rows` are the pictures of each concept, which are taken in turn."""
    images, labels = [], []
    for turn in range(times):
        for pair in rng.permutation(len(rows)).reshape(-1, 2):
            two = np.hstack([pictures[rows[c][turn % len(rows[c])]] for c in pair])
            height, size = two.shape[:2]
            white = np.full((height // 2, size, 3), 255, np.uint8)
            square = Image.fromarray(np.vstack([white, two, white]))
            images.append(np.asarray(square.resize((height, height), Image.Resampling.BICUBIC)))
            labels.append(np.isin(np.arange(len(rows)), pair))
    return np.stack(images), np.stack(labels)


def scenes(
    data: DataSet, shots: Sequence[int], seeds: Sequence[int], of: str = "", far: float = 0.0, named: bool = False
) -> TaskSource:
    """Images as a data set of scenes: of each class the same share, `shots` on the mean, makes the support's, and all
    others make the test's. With `far` there are COPIES of each support scene, one after another, and all scenes, of
    length 1, are moved that far as images of a class differ; `named`: which images are one scene is given."""
    images, labels, classes = data.images.plain, data.labels, int(data.labels.max()) + 1
    own = images - np.stack([images[labels == c].mean(0) for c in range(classes)])[labels]

    def draw(k: int, seed: int) -> LabelSets:
        rng = np.random.default_rng(seed)
        of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(classes)]
        chosen = np.concatenate([rows[: round(k * classes / len(labels) * len(rows))] for rows in of_class])
        parts = chosen, np.setdiff1d(np.arange(len(labels)), chosen)
        (support, members), (queries, truth) = (sums(images[rows], labels[rows], classes, rng) for rows in parts)
        groups = np.repeat(np.arange(len(members)), COPIES) if named else None
        if far:
            support, members = (np.repeat(rows, COPIES, axis=0) for rows in (support, members))
            support, queries = (
                unit(one + far * unit(own[rng.integers(len(own), size=len(one))])) for one in (support, queries)
            )
        return LabelSets(Embeddings(support), members, Embeddings(queries), truth, data.text, data.tau, groups, of)

    return TaskSource(data.name, tuple(shots), tuple(seeds), draw)


def sums(images: np.ndarray, labels: np.ndarray, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Scenes (B, D) of unit length and their labels (B, C) bool, of images (n, D) with labels (n,), of which each is in
    one scene: as many scenes of 1 as of 2, up to MOST images, with weights of 0.5 to 1. What would be a scene's second
    of a class is left out, and the last images, which are too few."""
    of_each = np.arange(1, MOST + 1)
    sizes = rng.permutation(np.tile(of_each, len(labels) // of_each.sum()))
    scene = np.repeat(np.arange(len(sizes)), sizes)
    order = rng.permutation(len(labels))[: len(scene)]
    first = np.unique(scene * classes + labels[order], return_index=True)[1]
    members, found = np.zeros((len(sizes), classes), bool), np.zeros((len(sizes), images.shape[1]))
    members[scene[first], labels[order[first]]] = True
    np.add.at(found, scene[first], rng.uniform(0.5, 1.0, len(first))[:, None] * images[order[first]])
    return unit(found.astype(np.float32)), members


def pictures_of_table(name: str, file: str, shots: Sequence[int] | None, seeds: Sequence[int]) -> TaskSource:
    """Pictures of a CSV file, encoded by "photographs": random ones are the support, and all others the test. Shots are
    of each label, on the mean; by default a fifth, a third and a half of the pictures."""
    listed, encoder = labelled_images(file), Classifier("photographs").encoder
    members, paths = read_label_sets(listed.labels, len(listed.paths), listed.class_names)[1], listed.paths
    parts = [to_pixels(paths[start : start + BATCH], encoder.geometry) for start in range(0, len(paths), BATCH)]
    images, of_label = Embeddings.concatenate([*map(encoder.encode, parts)]), members.sum() / members.shape[1]

    def draw(k: int, seed: int) -> LabelSets:
        order = np.random.default_rng(seed).permutation(len(members))
        support, test = np.split(order, [round(k / of_label * len(order))])
        return LabelSets(images[support], members[support], images[test], members[test])

    return TaskSource(name, tuple(shots or [round(share * of_label) for share in (0.2, 0.35, 0.5)]), tuple(seeds), draw)


def paths_of(word: str) -> tuple[TreePath, ...]:
    """A tree over the demo's concepts, their group of emoji, "animal mammal", below the word that groups share; of a
    feature file over clusters (Ward) of the class means of its own support images, which are in no draw."""
    if word == "demo":
        groups = {concept["name"]: concept["subgroup"] for concept in load_index()["concepts"]}
        of_concepts = [groups[name] for name in held_out()[0].names]
        return tuple(tuple(dict.fromkeys((f"any {group.split()[0]}", group))) for group in of_concepts)
    (source,) = open_sources([word])
    support = source.draw(max(source.shots), 0).support
    merged = ward(np.stack([support.embeddings.plain[support.labels == c].mean(0) for c in range(support.n_classes)]))
    cuts = [fcluster(merged, max(support.n_classes // each, 2), "maxclust").tolist() for each in (12, 4)]
    return tuple((f"group {group}", f"family {family}") for group, family in zip(*cuts, strict=True))
