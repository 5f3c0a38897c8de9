"""The text of benchmarks/README.md: how it is made, what was not measured, then a section for each kind of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tools.reporting.charts import Chart, charts
from tools.reporting.load import EVALUATIONS, NEEDED, TIMINGS, BrokenResults, Results
from tools.reporting.tables import compiled_table, evaluation_tables, gpu_tables, peer_tables, serving_tables
from tools.reporting.timings import timing_tables

PAGE, PLOTS = "README.md", "plots"
ABOUT = {
    "encoder": "Plain and adapted embedding of every picture: fused in one pass, against the two passes of the papers' "
    "code. `-sN`: adapters from block N on. `one-pass`: the plain encoder alone, without any adapted embedding.",
    "precision": "The fused encoder in fewer bits, against fp32. `min cosine`: the smallest with fp32's embeddings.",
    "scaling-encoder": "Ours and the two passes from batch 1 on.",
    "score": "Logits of embeddings against a cache of keys: queries, keys, width, classes. `eager-best` is the "
    "best eager PyTorch; `torch-fp32` its product of queries and keys alone, which is no scoring.",
    "scaling-score": "One size varied at a time.",
    "search": "A method's parameters on a validation set: every alpha exactly, and the public code's grid.",
    "train": "An epoch: ours, with the frozen part's outputs cached and not, and the recipe of the papers' public "
    "code; `pruned-graph` is that recipe with autograd from the first adapter on.",
    "updates": "One example or class more or less, against fitting again.",
    "fit": "From files to a fitted classifier, beside encoding alone and a logistic regression.",
    "pipeline": "From files to labels, beside what encoding and decoding reach alone and a straightforward script.",
    "classifier": "From uint8 pictures to labels.",
    "cold-start": "From process start to the first answer.",
}
HEAD = """# Benchmarks

What iosr_fast does in a second and what a picture takes, beside its rivals. This page is made from the rows in
`{folder}` by `tools/report.py` and contains nothing else: below each table stand the file, cases, device,
threads, versions and commit of its numbers. Do not edit it; make it again with

```
python tools/benchmark.py all --out benchmarks/results && python tools/report.py
```

Every candidate of a benchmark was checked against a reference before it was timed, and rivals were timed in turn with
ours, in one run. `ms` is the median, followed by the 10th and 90th percentile. `X / this` is X's time over this row's:
above 1, this row is faster. `of ceiling %` is the share of what the machine reached in the same run at the work named.
Numbers are rounded to four digits, percentages to two places. Rows of different files can be of different machines and
days: compare within a table."""


def pages(results: Sequence[Results], folder: Path, out: Path) -> tuple[str, list[Chart]]:
    """The text of the page, and the figures that it shows."""
    link = Path(os.path.relpath(folder, out)).as_posix()
    drawn = charts(results)
    lines = [HEAD.format(folder=link), "", "## Machines and commits", "", *_machines(results)]
    lines += ["", "## Not measured", "", *_not_measured(results)]
    rows = [part for part in results if part.kind == "rows"]
    for bench in (*TIMINGS, *sorted({bench for part in rows for bench in part.rows} - {*TIMINGS, *NEEDED})):
        parts = [part for part in rows if part.rows.get(bench)]
        if not parts:
            continue
        lines += ["", f"## {TIMINGS.get(bench, f'{bench} (no section of its own yet)')}", ""]
        lines += [ABOUT.get(bench, "Rows of a bench that this page does not know, as they are.")]
        for chart in drawn.get(bench, []):
            sources = ", ".join(f"[{name}]({link}/{name})" for name in chart.sources)
            lines += ["", f"![{chart.title}]({PLOTS}/{chart.file})", "", f"{chart.caption} Rows: {sources}."]
        for part in parts:
            lines += _render(part, partial(_timings, bench), link)
    sections: tuple[tuple[str, Callable[[Results, str], list[str]], Callable[[Results], bool]], ...] = (
        ("Serving", serving_tables, lambda part: part.kind == "serving"),
        ("Serving, beside another server", peer_tables, lambda part: part.kind == "peers"),
        ("Accuracy", evaluation_tables, lambda part: any(part.rows.get(bench) for bench in EVALUATIONS)),
        ("NVIDIA GPUs", gpu_tables, lambda part: part.kind == "gpu"),
    )
    for title, make, belongs in sections:
        parts = [part for part in results if belongs(part)]
        lines += ["", f"## {title}"] if parts else []
        for part in parts:
            heading = [] if part.kind == "gpu" else ["", f"### [{part.name}]({link}/{part.name})"]
            lines += [*heading, "", *_render(part, make, link)]
    if compiled := [part for part in results if part.rows.get("aot")]:
        lines += ["", "## GPU kernels, compiled ahead of time", "", *compiled_table(compiled, link)]
    return "\n".join(lines) + "\n", [chart for group in drawn.values() for chart in group]


def _timings(bench: str, part: Results, link: str) -> list[str]:
    return timing_tables(part.name, link, part.rows[bench])


def _render(part: Results, make: Callable[[Results, str], list[str]], link: str) -> list[str]:
    """The lines for the rows of a file. Names the file if a field has another form than its kind of rows has."""
    try:
        return make(part, f"{link}/{part.name}")
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise BrokenResults(
            f"{part.name}: a field does not have the form that {part.kind} files have ({type(error).__name__}: "
            f"{error}); make the file again or remove it"
        ) from error


def _machines(results: Sequence[Results]) -> list[str]:
    commits: dict[str, dict[str, set[str]]] = {}
    for part in results:
        for row in (part.facts, *(row for rows in part.rows.values() for row in rows)):
            if row.get("device"):
                files = commits.setdefault(str(row["device"]), {})
                files.setdefault(part.name, set()).add(str(row.get("commit") or "commit not given"))
    lines = []
    for device, files in sorted(commits.items()):
        listed = [f"{name} ({', '.join(sorted(ids))})" for name, ids in sorted(files.items())]
        lines.append(f"- {device}: {', '.join(listed)}")
    if any("+dirty" in line for line in lines):
        lines += ["", "`+dirty`: the tree differed from the commit when the rows were made."]
    return lines or ["No row names a device."]


def _not_measured(results: Sequence[Results]) -> list[str]:
    lines = []
    gpus = [part for part in results if part.kind == "gpu" and not part.facts.get("trial")]
    if not gpus:
        lines.append(
            "- **No GPU.** The results hold no file of `make gpu-check`, so no time on this page is a GPU's. "
            "`make gpu-check` on a machine with an NVIDIA GPU writes one."
        )
    lines += [
        f"- On {part.facts.get('device')}, what [its section](#nvidia-gpus) lists as skipped."
        for part in gpus
        if part.facts.get("skipped")
    ]
    for bench, title in TIMINGS.items():
        if not any(part.kind == "rows" and part.rows.get(bench) for part in results):
            command = "scaling" if bench.startswith("scaling") else bench
            lines.append(f"- {title}: no rows of `{bench}` (`python tools/benchmark.py {command}` makes them).")
    if not any(part.kind == "serving" for part in results):
        lines.append("- Serving under load: no file of `tools/load_test.py`.")
    if not any(part.rows.get("accuracy") for part in results):
        lines.append("- Accuracy: no rows of `tools/evaluate.py`.")
    encoders = [row for part in results for bench in ("encoder", "precision") for row in part.rows.get(bench, [])]
    if any(str(row["case"]).startswith("vit-") for row in encoders):
        lines.append(
            "- Accuracy of the ViTs in the encoder's tables: their weights are random, which changes no speed."
        )
    return lines or ["Nothing that this page has a place for."]
