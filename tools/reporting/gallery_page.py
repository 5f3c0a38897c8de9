"""The text of docs/gallery.md: a function of what tools/gallery.py measured and of the rows of accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.page_screenshot import SHOWN as ON_PAGE
from tools.reporting.gallery_figures import Answer
from tools.reporting.load import Row
from tools.reporting.text import percent, table

TEMPLATE = """# Gallery

Pictures of what the package does, on [the demo](demo.md): a small CLIP that was trained on emoji of
64x64 pixels. The numbers say nothing about photographs. All concepts here are held out: neither the
CLIP nor the adapter saw them in training. `make gallery` makes this page and its pictures again,
with fixed seeds.

## Overlap before and after the adapter

![Histograms of the cosine similarity of two pictures, for pairs of one class and pairs of two
classes. They share an area of {plain} with plain embeddings and {adapted} with adapted
ones.](gallery/overlap.png)

Cosines of all pairs of {images} pictures of {concepts} concepts. Where the two curves share an area,
a cosine does not say whether two pictures are of one class. A smaller area is better. AUROC is the
probability that a pair of one class has a higher cosine than a pair of two classes. On this CLIP
the adapter lowers the overlap a little.

{overlap_table}

## Accuracy by shots and method

![Accuracy of each method by the number of support pictures of a class, on the left without the
adapter and on the right with it. The table below has the numbers.](gallery/accuracy.webp)

Accuracy in % on {test_images} test pictures of {test_classes} classes: mean ± standard deviation over
{draws} draws of the support pictures (seeds {seeds}). Methods with `++` compare adapted embeddings. In
{better} of {pairs} cases the `++` method has a higher mean than the same method without the adapter. `auto`
chooses the method on the support pictures. With one picture of a class the parameters follow a
rule; with more they are chosen by leave-one-out on the support pictures. No test picture chooses
anything.

{accuracy_table}

The numbers are the rows without a reducer in
[accuracy-demo.json](../benchmarks/results/accuracy-demo.json). [Accuracy](accuracy.md) explains how
they are measured.

## A folder classified

![A grid of {shown} emoji with predicted class and probability. {shown_right} are right, in green frames. The
others have orange frames and name the true class.](gallery/folder.webp)

The classifier of `make serve` knows {classes} classes from {shots} pictures of each, by `{method}`. It
classifies a folder of {folder} other pictures of these classes: {right} ({right_share}) are right;
chance is {chance}. The picture shows the first {shown} of a random order, right or wrong.

## What a prediction rests on

![{explained}
Bars show what texts, examples and adapted embeddings of the examples contribute to the highest
logits; thumbnails show the nearest support pictures.](gallery/explanation.webp)

The first right picture of the grid and the first wrong one. The logit of a class is the sum of what
its text contributes (texts) and what the examples contribute, by their plain embeddings (examples)
and by their adapted ones (adapter). Below each class are these parts and their sum. Only
differences between classes count, so the bars of each part start at its minimum over the classes
shown. A part can be negative. On the right are the support pictures with the highest cosines.

## The server's page

![The server's page: a picture of a pear and four others on the left; on the right the predicted
class, the probabilities with bars for texts, examples and adapter, and the nearest examples. Below,
the list of classes and the form that adds one.](page.png)

`make serve` serves the classifier above with this page. The small pictures are the first {on_page} of the
grid above, whatever their labels: {on_page_right} of the {on_page} labels are right. The last one is a pear. That
class was missing, and was then added from three examples.
`python tools/page_screenshot.py --out docs/page.png` makes this picture again and needs Chromium.

## Sources and licences of the pictures

The emoji above are drawings from these sets, rendered to 64x64 pixels on white and scaled. Their
names are from emojibase ([MIT](gallery/LICENSE-emojibase.txt)).

{licence_table}
"""


def page(
    overlap: Sequence[Row],
    accuracy: Sequence[Row],
    answers: Sequence[Answer],
    shown: Sequence[Answer],
    explained: Sequence[Answer],
    facts: Mapping[str, Any],
) -> str:
    """`answers` are those of the whole folder; `facts` has classes, shots and method of its classifier and `styles`."""
    plain, adapted = overlap
    means = {(row["method"], row["shots"]): row["mean"] for row in accuracy}
    pairs = [(mean, means[f"{name}++", k]) for (name, k), mean in means.items() if (f"{name}++", k) in means]
    right = sum(answer.right for answer in answers)
    return TEMPLATE.format(
        plain=f"{plain['overlap_area']:.3f}",
        adapted=f"{adapted['overlap_area']:.3f}",
        images=f"{plain['images']:,}",
        concepts=plain["classes"],
        overlap_table=_table(
            {
                "embeddings": [row["embeddings"] for row in overlap],
                "overlap area": [f"{row['overlap_area']:.3f}" for row in overlap],
                "AUROC": [f"{row['auroc']:.3f}" for row in overlap],
            }
        ),
        test_images=_range(accuracy, "test_images"),
        test_classes=_range(accuracy, "classes"),
        draws=len(accuracy[0]["seeds"]),
        seeds=", ".join(map(str, accuracy[0]["seeds"])),
        better=sum(with_adapter > without for without, with_adapter in pairs),
        pairs=len(pairs),
        accuracy_table=_table(_accuracy_columns(accuracy)),
        shown=len(shown),
        shown_right=sum(answer.right for answer in shown),
        classes=facts["classes"],
        shots=facts["shots"],
        method=facts["method"],
        folder=len(answers),
        right=right,
        right_share=f"{right / len(answers):.1%}",
        chance=f"{1 / facts['classes']:.1%}",
        on_page=ON_PAGE,
        on_page_right=sum(answer.right for answer in shown[:ON_PAGE]),
        explained="\n".join(_explain(answer) for answer in explained),
        licence_table=_table(_licence_columns(facts["styles"]), texts=3),
    )


def _table(columns: Mapping[str, Sequence[str]], texts: int = 1) -> str:
    return "\n".join(table(columns, "", texts))


def _accuracy_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    cells = {(row["method"], row["shots"]): percent(row["mean"], row["std"]) for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shots = sorted({row["shots"] for row in rows})
    names = {k: f"{k} picture{'s' * (k > 1)}" for k in shots}
    return {"method": methods} | {names[k]: [cells.get((name, k), "") for name in methods] for k in shots}


def _licence_columns(styles: Mapping[str, Row]) -> dict[str, list[str]]:
    sets = list(styles.values())
    return {
        "set": [f"[{one['title']}]({one['source']})" for one in sets],
        "author": [one["author"] for one in sets],
        "licence": [f"[{one['licence']}](gallery/LICENSE-{one['licence']}.txt)" for one in sets],
    }


def _explain(answer: Answer) -> str:
    return f"A picture of {answer.truth!r} gets the label {answer.label!r} with {answer.probability:.0%}."


def _range(rows: Sequence[Row], key: str) -> str:
    counts = sorted({count for row in rows for count in row[key]})
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
