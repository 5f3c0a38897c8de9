"""Is what a classifier says of itself true? Its accuracy, log-loss, sets of labels and promises beside those of test
images: of independent pictures, of bursts, in few dimensions, and of other shops than the test's.

own, true       right labels of the images that judge, left-out support images or those of a calibration, and of test
                images
alike           of test images with the class sizes of those that judge
in_range        draws whose accuracy `alike` is in the 95% range that the classifier gives
own_loss, loss  log-loss in nats of the images that judge, and of test images
error           expected calibration error of test images
covered         test images whose set of labels, promised for 90%, has the label
warned          draws that warn of look-alikes: in the fit, or, with a calibration, in this
untold          draws that say that bursts cannot be told from other pictures
refused         draws whose calibration is refused; these are judged as fitted
labelled        for each promise the test images whose label is accepted
wrong           of these, those whose label is wrong; worst: in the worst draw
broken          draws with more of them than promised beyond chance (a one-sided binomial test at 5%)
breaks, p       broken promises of all draws, out of `made` that accept anything; and the probability of as many by
                chance (an exact binomial test of 5%, as if promises and draws were independent)

With half of the classes known, the others' test images being pictures of unknown classes, in the first draws:

auroc, best     of `unknown_score`, and the highest of the scores of which it is made
kept, rejected  with keep=0.95 the known test images that are kept, and the unknown ones that are rejected
strangers       unknown test images whose label is accepted at 2%; both: those that are kept and accepted at 5%

`drawings` are turns, crops and lights of the demo's pictures, `photographs` of tiles of those of scikit-image (pip
install scikit-image), in bursts; "one by one", each support image is left out alone. Of feature files validation and
test images are drawn together, with and without texts, some as support and the others as test. A file with arrays
x (N, D), y (N,) and split (N,), "train" or "test", has half of the training images of each class as support: of the
Grocery Store Dataset 16 a class on the mean.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from scipy.stats import binom, binomtest

from benchmarks.claims.claim import Claim, Draws, fit, rows_of
from iosr_fast.backbones.demo.pictures import load_pictures, only
from iosr_fast.backbones.load import load_clip
from iosr_fast.backbones.prompts import embed_classes
from iosr_fast.encoders.encoder import Embeddings, unit
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.evaluation.features import TAU, open_sources
from iosr_fast.evaluation.tasks import Task, TaskSource
from iosr_fast.exceptions import IosrFastError
from iosr_fast.few_shot_head import FewShotHead
from iosr_fast.head.verdict import Abstention, judge
from iosr_fast.methods.automation import least_odds
from iosr_fast.methods.conformal import Judged, of_logits
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.reports.page import curves, element
from iosr_fast.utils.ranking import auroc

PLOT = Path(__file__).resolve().parents[2] / "docs" / "automation.svg"
PROMISES, COVERAGE, KEPT, CHANCE = {f"{percent}%": percent / 100 for percent in (1, 2, 5, 10)}, 0.9, 0.95, 0.05
SHOTS, SEEDS, WIDTHS = (4, 8, 16), 20, (32, 64, 128)
HALVES, ENOUGH = 5, 100  # draws of which half of the classes are known, too, of more support images than that
BURST, RECENT = 4, 250  # variants of a picture in a burst, at four images a class two; pictures of a calibration
ONE_BY_ONE, SIBLINGS, OTHERS = "one by one", "calibrated on siblings", "calibrated on others"
SECONDS = 600.0  # for the search of parameters, which then tries the same on a busy machine
CONCEPTS, STYLES, ROWS, COLUMNS, SIDE = 100, 7, 4, 6, 64
PHOTOGRAPHS = "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field moon page rocket"


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
    """A task, and what its row is of: ONE_BY_ONE, SIBLINGS, OTHERS, a number of dimensions, or none of these."""

    of: str = ""


def sources(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[TaskSource]:
    counts, numbers = sorted(shots or SHOTS), range(seeds or SEEDS)
    found = []
    for word in words:
        data_sets = opened(word)
        first = data_sets[0]
        found += [drawn(data, counts if first.train is None else counts[-1:], numbers) for data in data_sets]
        found += [drawn(data, counts[-1:], numbers, of) for of, data in others_of(first).items()]
    return found


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


def others_of(data: DataSet) -> dict[str, DataSet]:
    """What else is measured of a data set, with the most images a class."""
    if data.variants > 1:
        return dict.fromkeys((ONE_BY_ONE, SIBLINGS, OTHERS), data)
    if data.train is not None:
        return dict.fromkeys((SIBLINGS, OTHERS), data)
    calibrated, widths = ({}, WIDTHS[1:2]) if data.text is None else ({OTHERS: data}, WIDTHS)
    return calibrated | {f"{width} dimensions": projected(data, width) for width in widths}


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


def drawn(data: DataSet, shots: Sequence[int], seeds: Sequence[int], of: str = "") -> TaskSource:
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
        return Cell(support, *taken(others, 0, 1), validation, of)

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


def draws(task: Cell, method: str, seed: int) -> Draws:
    support, options = task.support, {"tune_seconds": SECONDS, "look_alikes": task.of != ONE_BY_ONE}
    head = fit(support.embeddings, support.labels, support.text, support.tau, method, **options)
    if task.validation is not None:
        with suppress(IosrFastError):  # refused
            head.calibrate_on(rows_of(task.validation[0]), task.validation[1])
    refused = task.validation is not None and head.snapshot().calibration is None
    yield {"of": task.of, **of_labels(head, task.queries, task.labels), "refused": refused}
    if not task.of and seed < HALVES and len(support.labels) > ENOUGH:
        known = np.sort(np.random.default_rng(seed).permutation(support.n_classes)[::2])
        inside, text = np.isin(support.labels, known), None if support.text is None else support.text[known]
        head = fit(support.embeddings[inside], support.labels[inside], text, support.tau, method, **options)
        yield {"of": "half known", **of_strangers(head, task.queries, np.isin(task.labels, known))}


def of_labels(head: FewShotHead, queries: Embeddings, labels: np.ndarray) -> dict[str, Any]:
    """What the classifier says of itself, and what is true of queries with labels (B,)."""
    inner: Any = head.snapshot()
    judged, (low, high) = inner.judged, inner.accuracy_range
    test = of_logits(inner.calibrated(inner.score(queries)), labels)
    said, true = judged.reliability, test.reliability
    sizes = np.bincount(judged.labels, minlength=len(head.classes_))
    alike = np.average(test.right[:, 0], weights=sizes[labels] / np.bincount(labels)[labels])
    covered = None
    with suppress(IosrFastError):  # too few images judge
        covered = (test.label_odds >= judged.thresholds(COVERAGE)).mean()
    return {
        **{"own": said.accuracy, "true": true.accuracy, "alike": alike},
        **{"low": low, "high": high, "in_range": low <= alike <= high},
        **{"own_loss": said.log_loss, "loss": true.log_loss, "error": true.error},
        **{"covered": covered, "warned": bool(inner.look_alike_warning)},
        "untold": bool(inner.look_alikes and inner.look_alikes.doubt),
        **of_promises(judged, test),
    }


def of_promises(judged: Judged, test: Judged) -> dict[str, Any]:
    """What holds on test images of what is promised by images that were judged."""
    found: dict[str, Any] = {}
    for name, promised in PROMISES.items():
        _, answered, wrong = answers(judged, test, promised)
        n, k = int(answered.sum()), int(wrong.sum())
        found |= {f"labelled_{name}": answered.mean(), f"wrong_{name}": k / max(n, 1)}
        found[f"broken_{name}"] = k > 0 and binom.sf(k - 1, n, promised) < CHANCE
    return found


def answers(judged: Judged, test: Judged, promised: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The level of the node that is answered, whether one is, and whether it is wrong, each (B,), of test images."""
    return test.answered(least_odds(judged, promised))


def of_strangers(head: FewShotHead, queries: Embeddings, is_known: np.ndarray) -> dict[str, Any]:
    inner: Any = head.snapshot()
    score, singles = inner.unknown.score(queries), inner.unknown.scorer(queries).T
    kept = head.predict(rows_of(queries), "reject", keep=KEPT) != np.array(None)
    abstentions = (Abstention(max_error=promised) for promised in (0.02, 0.05))
    accepted, at_5 = (judge(inner, queries, abstention).accepted for abstention in abstentions)
    return {
        "auroc": auroc(score[~is_known], score[is_known]),
        "best": max(auroc(one[is_known], one[~is_known]) for one in singles),
        **{"kept": kept[is_known].mean(), "rejected": 1.0 - kept[~is_known].mean()},
        "strangers": accepted[~is_known].mean(),
        "both": (at_5 & kept)[~is_known].mean(),
    }


def of_draws(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The broken promises of all draws, and the share of wrong labels in the worst of them."""
    names = [key.removeprefix("broken_") for key in draws[0] if key.startswith("broken_")]
    if not names:
        return {}
    made = sum(bool(draw[f"labelled_{name}"]) for draw in draws for name in names)
    breaks = sum(bool(draw[f"broken_{name}"]) for draw in draws for name in names)
    p = binomtest(breaks, made, CHANCE, alternative="greater").pvalue if made else None
    worst = {f"worst_{name}": max(draw[f"wrong_{name}"] for draw in draws) for name in names}
    return {"made": made, "breaks": breaks, "p": p, **worst}


CLAIM = Claim("automation", __doc__, draws, sources=sources, pool=of_draws)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of what held of the promises with the most images a class, a panel for each feature file."""
    panels: list[Any] = []
    most = max(row["shots"] for row in rows)
    for row in rows:
        if row["data"].endswith(".npz") and (row["of"], row["shots"]) == ("", most):
            at = [(row[f"labelled_{name}"], name) for name in PROMISES]
            lines = {
                "promised": [(x, PROMISES[name]) for x, name in at],
                f"in the worst of {len(row['seeds'])} draws": [(x, row[f"worst_{name}"]) for x, name in at],
                "on the mean": [(x, row[f"wrong_{name}"]) for x, name in at],
            }
            place = {"x": 580 * len(panels), "width": 560, "height": 344}
            panels.append(curves(lines, f"labels accepted, {row['data'][:-4]}", "of these wrong", **place))
    return element("svg", *panels, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {580 * len(panels)} 344")


if __name__ == "__main__":
    if "labels accepted" in (svg := plot(CLAIM.main())):
        PLOT.write_text(svg, encoding="utf-8")
