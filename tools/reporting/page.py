"""The page: what it is, how it is made again, what was not measured, then a section for each kind of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tools.reporting.figures import plots
from tools.reporting.gpu import gpu_tables
from tools.reporting.load import EVALUATIONS, TIMINGS, BrokenResults, Results, Row
from tools.reporting.style import Plot
from tools.reporting.tables import compiled_table, evaluation_tables, serving_tables
from tools.reporting.timings import timing_tables

PAGE, PLOTS = "README.md", "plots"
TOLD = {
    "encoder": "Plain and adapted embedding of every picture: fused in one pass, against the two passes of the papers' "
    "code. `-sN`: adapters from block N on. `one-pass`: the plain encoder alone, without any adapted embedding.",
    "precision": "The fused encoder in fewer bits, against fp32. `min cosine`: the least with fp32's embeddings.",
    "scaling-encoder": "Ours and the two passes from batch 1 on.",
    "score": "Logits of embeddings against a cache of keys: queries, keys, width, classes. `eager-best` is the "
    "best eager PyTorch; `torch-fp32` its product of queries and keys alone, which is no scoring.",
    "scaling-score": "One size varied at a time.",
    "search": "A method's parameters on a validation set: every alpha exactly, and the public code's grid.",
    "train": "An epoch: ours, with the frozen part's outputs kept and not, and the recipe of the papers' public code; "
    "`pruned-graph` is that recipe with autograd from the first adapter on.",
    "updates": "One example or class more or less, against fitting again.",
    "pipeline": "From files to labels, beside what its halves reach alone and a script as one would write it.",
    "classifier": "From uint8 pictures to labels.",
    "cold-start": "From nothing to the first answer.",
}
AGAIN = "python tools/benchmark.py all --out benchmarks/results && python tools/report.py"
HEAD = """# Benchmarks

What iosr_fast does in a second and what a picture takes, beside its rivals. This page is made from the rows in
[{folder}]({folder}) by `tools/report.py` and says nothing that they do not: below each table stand the file, cases,
device, threads, versions and commit that its numbers come from. It is not edited by hand; what makes it again is

```
{again}
```

Every candidate of a benchmark was checked against a reference before it was timed, and rivals were timed in turn with
ours, in one run. `ms` is the median; beside it stand the 10th and 90th percentile. `X / this` is how many times as long
X takes: above 1, this row is the faster. `of ceiling %` is the share of what the machine reached in the same run at the
work named. Numbers are rounded to four digits, percentages to two places. Rows of different files can be of different
machines and days: compare within a table."""


def pages(results: Sequence[Results], folder: Path, out: Path) -> tuple[str, list[Plot]]:
    """The README's text and the figures that it shows."""
    link = Path(os.path.relpath(folder, out)).as_posix()
    drawn = plots(results)
    lines = [
        HEAD.format(folder=link, again=AGAIN),
        "",
        "## Machines and commits",
        "",
        *_machines(results),
    ]
    lines += ["", "## Not measured", "", *_not_measured(results)]
    for bench in (*TIMINGS, *_further(results)):
        having = [part for part in results if part.kind == "rows" and part.rows.get(bench)]
        if not having:
            continue
        lines += ["", f"## {TIMINGS.get(bench, f'{bench} (no section of its own yet)')}", ""]
        lines += [TOLD.get(bench, "Rows of a bench that this page does not know, as they are.")]
        for plot in drawn.get(bench, []):
            lines += [
                "",
                f"![{plot.title}]({PLOTS}/{plot.file})",
                "",
                f"{plot.told} Rows: {_links(plot.sources, link)}.",
            ]
        for part in having:
            lines += _of_file(part, partial(timing_tables, part.name, f"{link}/{part.name}", part.rows[bench]))
    lines += _section("Serving", [part for part in results if part.kind == "serving"], link)
    lines += _section(
        "Accuracy", [part for part in results if any(part.rows.get(bench) for bench in EVALUATIONS)], link
    )
    lines += _section("NVIDIA GPUs", [part for part in results if part.kind == "gpu"], link)
    compiled = [(part.name, f"{link}/{part.name}", part.rows["aot"]) for part in results if part.rows.get("aot")]
    if compiled:
        lines += ["", "## GPU kernels, compiled ahead of time", *compiled_table(compiled)]
    lines += _others(results, link)
    return "\n".join(lines) + "\n", [plot for shown in drawn.values() for plot in shown]


def _further(results: Sequence[Results]) -> list[str]:
    """Benches with times that have no section, after those that have one."""
    known = {*TIMINGS, *EVALUATIONS, "aot"}
    return sorted({bench for part in results if part.kind == "rows" for bench in part.rows} - known)


def _links(names: Sequence[str], link: str) -> str:
    return ", ".join(f"[{name}]({link}/{name})" for name in names)


def _sources(part: Results) -> list[Row]:
    """What of a file names a device and a commit."""
    return [part.facts, *(row for rows in part.rows.values() for row in rows)]


def _machines(results: Sequence[Results]) -> list[str]:
    devices: dict[str, dict[str, set[str]]] = {}
    for part in results:
        for row in _sources(part):
            if row.get("device"):
                commits = devices.setdefault(str(row["device"]), {}).setdefault(part.name, set())
                commits.update([str(row["commit"])] if row.get("commit") else [])
    lines = []
    for device in sorted(devices):
        files = [
            f"{name} ({', '.join(sorted(devices[device][name])) or 'commit not told'})"
            for name in sorted(devices[device])
        ]
        lines.append(f"- {device}: {', '.join(files)}")
    if any("+dirty" in line for line in lines):
        lines += ["", "`+dirty`: the tree differed from the commit when the rows were made."]
    return lines or ["No row names a device."]


def _not_measured(results: Sequence[Results]) -> list[str]:
    lines = []
    gpus = [part for part in results if part.kind == "gpu" and not part.facts.get("trial")]
    if not gpus:
        lines.append(
            "- **No GPU.** No file of `tools/gpu_check.py` is among the results, so no time on this page is a GPU's. "
            "`make gpu-check` on a machine with an NVIDIA GPU writes one."
        )
    for part in gpus:
        if part.facts.get("skipped"):
            lines.append(f"- On {part.facts['device']}, what [its section](#nvidia-gpus) says was skipped.")
    for bench, title in TIMINGS.items():
        if not any(part.kind == "rows" and part.rows.get(bench) for part in results):
            command = "scaling" if bench.startswith("scaling") else bench
            lines.append(f"- {title}: no rows of `{bench}` (`python tools/benchmark.py {command}` makes them).")
    if not any(part.kind == "serving" for part in results):
        lines.append("- Serving under load: no file of `tools/load_test.py`.")
    if not any(part.rows.get("accuracy") for part in results):
        lines.append("- Accuracy: no rows of `tools/evaluate.py`.")
    encoders = [
        str(row["case"]) for part in results for bench in ("encoder", "precision") for row in part.rows.get(bench, [])
    ]
    if any(case.startswith("vit-") for case in encoders):
        lines.append(
            "- Accuracy of the ViTs in the encoder's tables: their weights are random, which changes no speed."
        )
    return lines or ["Nothing that this page has a place for."]


def _section(title: str, parts: Sequence[Results], link: str) -> list[str]:
    if not parts:
        return []
    lines = ["", f"## {title}"]
    for part in parts:
        at = f"{link}/{part.name}"
        if part.kind == "gpu":
            lines += _of_file(part, partial(gpu_tables, part, at))
            continue
        lines += ["", f"### [{part.name}]({at})"]
        if part.kind == "serving":
            lines += _of_file(part, partial(serving_tables, part.name, at, part.facts))
        else:
            lines += _of_file(part, partial(evaluation_tables, part.name, at, part.rows))
    return lines


def _of_file(part: Results, make: Callable[[], list[str]]) -> list[str]:
    """The lines that a file's rows give; where a field is of another form than such rows have, the file is named."""
    try:
        return make()
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise BrokenResults(
            f"{part.name}: a field is not of the form that {part.kind} files have ({type(error).__name__}: {error}); "
            "make the file again or remove it"
        ) from error


def _others(results: Sequence[Results], link: str) -> list[str]:
    """Files without rows, and rows that have no table: nothing is left out in silence."""
    lines = []
    for part in results:
        for what, count in sorted(part.unknown.items()):
            lines.append(
                f"- [{part.name}]({link}/{part.name}): {count} of a kind that this page has no table for: {what}"
            )
        if part.kind == "rows" and not part.rows and not part.unknown:
            lines.append(f"- [{part.name}]({link}/{part.name}): an empty list")
    return ["", "## Other files", "", *lines] if lines else []
