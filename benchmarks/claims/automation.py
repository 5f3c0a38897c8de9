"""Are no more accepted labels wrong than `max_error` promises? Draws out of support and validation images together:

labelled   test images whose label is accepted
wrong      of these, those whose label is wrong
broken     draws in which more are wrong than promised
strangers  test images of unknown classes whose label is accepted, where half of the classes are known
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.evaluation.features import open_sources
from iosr_fast.evaluation.tasks import Source
from iosr_fast.methods.automation import images_needed_for
from iosr_fast.methods.support_set import make_support_set
from iosr_fast.reports.page import curves, element

PLOT = Path(__file__).resolve().parents[2] / "docs" / "automation.svg"
PROMISES, HALVES = (0.01, 0.02, 0.05, 0.1), 10  # of so many draws half of the classes are known, too


def pooled(words: Sequence[str], shots: Sequence[int] | None, seeds: int | None) -> list[Source]:
    """Draws of images of the largest support set and the validation set, never of test images."""

    def pool(source: Source) -> Source:
        task = source.draw(max(source.shots), 0)
        parts = [(task.support.embeddings, task.support.labels), *filter(None, [task.validation])]
        images, labels = zip(*parts, strict=True)
        of_task = task.support.text, task.support.tau, task.support.n_classes
        whole = make_support_set(Embeddings.concatenate(images), np.concatenate(labels), *of_task)

        def draw(k: int, seed: int) -> Task:
            order = np.random.default_rng(seed).permutation(len(whole.labels))
            rows = [order[whole.labels[order] == c][:k] for c in range(whole.n_classes)]
            return replace(task, support=whole.only(np.isin(np.arange(len(order)), np.concatenate(rows))))

        return Source(source.name, tuple(shots or (8, 16)), tuple(range(seeds or 100)), draw)

    return [pool(source) for source in open_sources(words)]


def draws(task: Task, method: str, seed: int) -> Draws:
    support, queries, labels = task.support, rows_of(task.queries), task.labels
    order = np.random.default_rng(seed).permutation(support.n_classes)
    for known in (order, order[::2])[: 1 + (seed < HALVES)]:
        every, inside, is_known = known is order, np.isin(support.labels, known), np.isin(labels, known)
        text = None if support.text is None else support.text[np.sort(known)]
        head = fit(support.embeddings[inside], support.labels[inside], text, support.tau, method)
        ways: Any = (
            [(p, None, "") for p in PROMISES] if every else [(0.02, None, ", half"), (0.02, "reject", ", rejecting")]
        )
        for promised, unknown, among in ways:
            if inside.sum() >= images_needed_for(promised):
                given = head.predict(queries, unknown, max_error=promised)
                accepted = given != np.array(None)
                wrong = (accepted & (given != labels))[is_known].sum() / max(accepted[is_known].sum(), 1)
                found = {"labelled": accepted[is_known].mean(), "wrong": wrong, "broken": wrong > promised}
                found |= {} if every else {"strangers": accepted[~is_known].mean()}
                yield {"of": f"{promised:.0%}{among}", **{name: round(float(v), 5) for name, v in found.items()}}


CLAIM = Claim("automation", __doc__, draws, sources=pooled)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of what held of the promises with the most images a class, a panel for each data set."""
    panels: list[Any] = []
    for data in dict.fromkeys(row["data"] for row in rows):
        most = max(row["shots"] for row in rows)
        kept = [row for row in rows if (row["data"], row["shots"]) == (data, most) and row["of"].endswith("%")]
        lines = {
            "promised": [(row["labelled"], float(row["of"][:-1]) / 100) for row in kept],
            "in the worst of 100 draws": [(row["labelled"], max(one["wrong"] for one in row["draws"])) for row in kept],
            "on the mean": [(row["labelled"], row["wrong"]) for row in kept],
        }
        place = {"x": 580 * len(panels), "width": 560, "height": 344}
        panels.append(curves(lines, f"labels accepted, {data.removesuffix('.npz')}", "of these wrong", **place))
    return element("svg", *panels, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {580 * len(panels)} 344")


if __name__ == "__main__":
    PLOT.write_text(plot(CLAIM.main()), encoding="utf-8")
