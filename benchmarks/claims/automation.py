"""Do promises hold, of independent pictures and of bursts? Look-alikes are left out together, or, "one by one", each
support image alone; bursts also "as groups".

own, true      right labels of left-out support images, and of test images
covered        test images whose set of labels, promised for 90%, has the label
labelled       for each promise the test images whose label is accepted
wrong          of these, those whose label is wrong
broken         draws with more of them than promised beyond chance (a one-sided binomial test at 5%)

With half of the classes known, the others' test images being pictures of unknown classes:

auroc, best    of `unknown_score`, and the highest of the scores of which it is made
kept, rejected with keep=0.95 the known test images that are kept, and the unknown ones that are rejected
strangers      unknown test images whose label is accepted at 2%

Of feature files validation and test images are drawn together, some as support and the others as test, with and without
texts, and once with a quarter of the images for half of the classes. `drawings` are turns, crops and lights of the
demo's pictures, `photographs` of tiles of those of scikit-image (pip install scikit-image): four of each picture are a
burst, two at four images a class, and other pictures of the concept, or tiles of the photograph, are the test.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from PIL import Image, ImageEnhance
from scipy.stats import binom

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.clip.demo.pictures import held_out, only
from iosr_fast.clip.load import load_clip
from iosr_fast.clip.prompts import embed_classes
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.evaluation.features import open_sources
from iosr_fast.evaluation.tasks import Task as FewShotTask
from iosr_fast.evaluation.tasks import TaskSource, with_unequal_classes
from iosr_fast.exceptions import IosrFastError
from iosr_fast.few_shot_head import FewShotHead
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.reports.page import curves, element
from iosr_fast.utils.ranking import auroc

PLOT = Path(__file__).resolve().parents[2] / "docs" / "automation.svg"
PROMISES, COVERAGE, KEPT = {f"{percent}%": percent / 100 for percent in (1, 2, 5, 10)}, 0.9, 0.95
HALVES, ENOUGH = 5, 100  # draws of which half of the classes are known, too, of more support images than that
SHOTS, BURST, CONCEPTS, STYLES, ROWS, COLUMNS, SIDE = (4, 8, 16), 4, 100, 7, 4, 6, 64
SIBLINGS, OTHERS, RECENT = "siblings", "others", 250  # what a classifier is calibrated on (`drawn`)
PHOTOGRAPHS = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field moon page rocket"


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    found, counts = dict[str, TaskSource](), (tuple(shots or SHOTS), tuple(range(seeds or 100)))
    for word in words:
        if word in PICTURES:
            found[word] = drawn(word, *PICTURES[word](), BURST, *counts)
            continue
        for source in with_and_without_texts(word):
            one = redrawn(source, *counts)
            unequal = with_unequal_classes(replace(one, shots=one.shots[-1:]))
            found |= {one.name: one, unequal.name: unequal}
    return [*found.values()]


def with_and_without_texts(word: str) -> list[TaskSource]:
    """A feature file, and if it has texts, the same without; or the demo."""
    alone = [] if word == "demo" else open_sources([word], use_text=False)
    return [*{source.name: source for source in (*open_sources([word]), *alone)}.values()]


def redrawn(source: TaskSource, *of: Any) -> TaskSource:
    """The data set, of which support and test are drawn from validation and test images together."""
    return drawn(source.name, *pooled(source), 1, *of)


def pooled(source: TaskSource) -> tuple[Embeddings, np.ndarray, np.ndarray | None, float]:
    """The validation and test images of a data set, with its texts."""
    task = source.draw(max(source.shots), 0)
    images, labels = zip((task.queries, task.labels), *filter(None, [task.validation]), strict=True)
    return Embeddings.concatenate(images), np.concatenate(labels), task.support.text, task.support.tau


def drawn(
    name: str,
    images: Embeddings,
    labels: np.ndarray,
    text: Any,
    tau: float,
    variants: int,
    *of: Any,
    calibration: str = "",
) -> TaskSource:
    """A data set of S pictures with `labels` (S,); `images` have `variants` of each, one after another. Support images
    are bursts of variants of the same picture; the first variants of other pictures are the test.

    Validation images are, by `calibration`, none, SIBLINGS, as many further variants of the support's pictures, or
    OTHERS, bursts of RECENT of the other pictures, at most half of them, which are not in the test then.
    """

    def draw(k: int, seed: int) -> FewShotTask:
        rng = np.random.default_rng(seed)
        order, burst = rng.permutation(len(labels)), min(BURST, variants, max(k // 2, 1))
        chosen = np.concatenate([order[labels[order] == c][: k // burst] for c in range(labels.max() + 1)])
        others = np.setdiff1d(order, chosen)

        def taken(pictures: np.ndarray, first: int, count: int) -> tuple[Embeddings, np.ndarray]:
            rows = (variants * pictures[:, None] + first + np.arange(count)).ravel()
            return images[rows], np.repeat(labels[pictures], count)

        validation = taken(chosen, burst, burst) if calibration == SIBLINGS else None
        if calibration == OTHERS:
            recent, others = np.split(rng.permutation(others), [min(RECENT, len(others) // 2)])
            validation = taken(recent, 0, burst)
        given = None if burst == 1 else np.repeat(chosen, burst)
        support = make_support_set(*taken(chosen, 0, burst), text, tau, labels.max() + 1, groups=given)
        return FewShotTask(support, *taken(others, 0, 1), validation)

    return TaskSource(name, *of, draw)


def drawings(variants: int = BURST) -> tuple[Embeddings, np.ndarray, np.ndarray | None, float]:
    """Variants of concepts that are drawn in all styles."""
    pictures = held_out()[0]
    whole = np.flatnonzero(np.bincount(pictures.concepts) == STYLES)[:CONCEPTS]
    pictures = only(pictures, np.isin(np.arange(len(pictures.names)), whole))
    clip = load_clip("demo")
    return bursts(pictures.images, variants), pictures.concepts, embed_classes(clip, pictures.names), clip.logit_scale


def photographs(variants: int = BURST) -> tuple[Embeddings, np.ndarray, np.ndarray | None, float]:
    """Variants of the tiles of photographs; each photograph is a class."""
    from skimage import data

    named = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS.split()]
    rows = np.stack([np.asarray(one.resize((COLUMNS * SIDE, ROWS * SIDE))) for one in named])
    tiles = rows.reshape(-1, ROWS, SIDE, COLUMNS, SIDE, 3).swapaxes(2, 3).reshape(-1, SIDE, SIDE, 3)
    return bursts(tiles, variants), np.repeat(np.arange(len(named)), ROWS * COLUMNS), None, 100.0


PICTURES = {"drawings": drawings, "photographs": photographs}


def bursts(pictures: np.ndarray, variants: int) -> Embeddings:
    """Plain embeddings of `variants` of each picture, one after another."""
    rng, run = np.random.default_rng(0), torch_encoder(load_clip("demo"), None)
    images = np.stack([variant(picture, rng) for picture in pictures for _ in range(variants)])
    return Embeddings(np.concatenate([run(part).plain for part in np.array_split(images, len(images) // 100)]))


def variant(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture turned by up to 15 degrees, with 80 to 100% of its sides, and as much as a third lighter or darker."""
    image = Image.fromarray(picture).rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    size = image.width * rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, image.width - size, 2)
    crop = image.resize(image.size, Image.Resampling.BICUBIC, (left, top, left + size, top + size))
    return np.asarray(ImageEnhance.Brightness(crop).enhance(rng.uniform(0.67, 1.33)))


def draws(task: Task, method: str, seed: int) -> Draws:
    support = task.support
    data = support.embeddings, support.labels, support.text, support.tau, method
    heads = {"": (head := fit(*data)), "one by one": one_by_one(head)}
    if support.groups is not None:
        heads["as groups"] = one_by_one(fit(*data, groups=support.groups))
    for of, head in heads.items():
        yield {"of": of, **rounded(of_labels(head, task))}
    if seed < HALVES and len(support.labels) > ENOUGH:
        known = np.sort(np.random.default_rng(seed).permutation(support.n_classes)[::2])
        inside, text = np.isin(support.labels, known), None if support.text is None else support.text[known]
        head = fit(support.embeddings[inside], support.labels[inside], text, support.tau, method)
        yield {"of": "half known", **rounded(of_strangers(head, task.queries, np.isin(task.labels, known)))}


def rounded(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(float(figure), 5) for name, figure in figures.items()}


def one_by_one(head: FewShotHead) -> FewShotHead:
    """The same fit, of which each support image is left out alone: as look_alikes=False gives it."""
    inner = head.snapshot()
    config = structs.replace(inner.config, look_alikes=False)
    alone = replace(inner, config=config).with_computed(plan=inner.plan)
    made = copy(head)
    made._fit = replace(head._fitted(), head=alone)
    return made


def of_strangers(head: FewShotHead, queries: Embeddings, is_known: np.ndarray) -> dict[str, Any]:
    score, rows = head.unknown_.score(queries), rows_of(queries)
    singles = head.unknown_.scorer(queries).T
    kept = head.predict(rows, "reject", keep=KEPT) != np.array(None)
    return {
        "auroc": auroc(score[~is_known], score[is_known]),
        "best": max(auroc(one[is_known], one[~is_known]) for one in singles),
        **{"kept": kept[is_known].mean(), "rejected": 1.0 - kept[~is_known].mean()},
        "strangers": are_accepted(head, rows[~is_known], 0.02).mean(),
    }


def of_labels(head: FewShotHead, task: Task) -> dict[str, Any]:
    rows, labels = rows_of(task.queries), task.labels
    right, sets = head.predict(rows) == labels, head.predict_sets(rows, COVERAGE)
    found: dict[str, Any] = {"own": head.calibration().accuracy, "true": right.mean()}
    found["covered"] = np.mean([label in one for label, one in zip(labels, sets, strict=True)])
    return found | of_promises(head, rows, right)


def of_promises(head: FewShotHead, rows: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """What each promise accepts of rows whose label is `right` (B,) bool."""
    found: dict[str, Any] = {}
    for name, promised in PROMISES.items():
        sure = are_accepted(head, rows, promised)
        n, wrong = int(sure.sum()), int((sure & ~right).sum())
        found |= {f"labelled_{name}": n / len(right), f"wrong_{name}": wrong / max(n, 1)}
        found[f"broken_{name}"] = wrong > 0 and binom.sf(wrong - 1, n, promised) < 0.05
    return found


def are_accepted(head: FewShotHead, rows: np.ndarray, promised: float) -> np.ndarray:
    """(B,) bool; none where there are too few images for this promise."""
    try:
        return np.array(head.predict(rows, max_error=promised) != np.array(None))
    except IosrFastError:
        return np.zeros(len(rows), bool)


CLAIM = Claim("automation", __doc__, draws, sources=sources)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of what held of the promises with the most images a class, a panel for each feature file."""
    panels: list[Any] = []
    most = max(row["shots"] for row in rows)
    for row in rows:
        if row["data"].endswith(".npz") and (row["of"], row["shots"]) == ("", most):
            at, draws = [(row[f"labelled_{name}"], name) for name in PROMISES], row["draws"]
            lines = {
                "promised": [(x, PROMISES[name]) for x, name in at],
                f"in the worst of {len(draws)} draws": [
                    (x, max(one[f"wrong_{name}"] for one in draws)) for x, name in at
                ],
                "on the mean": [(x, row[f"wrong_{name}"]) for x, name in at],
            }
            place = {"x": 580 * len(panels), "width": 560, "height": 344}
            panels.append(curves(lines, f"labels accepted, {row['data'][:-4]}", "of these wrong", **place))
    return element("svg", *panels, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {580 * len(panels)} 344")


if __name__ == "__main__":
    if "labels accepted" in (svg := plot(CLAIM.main())):
        PLOT.write_text(svg, encoding="utf-8")
