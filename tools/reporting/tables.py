"""Tables of rows without times: serving under load, accuracy, overlap, the adapter's place, kernels, GPU files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.reporting.load import EVALUATIONS, NEEDED, Results, Row
from tools.reporting.text import by_origin, natural, number, origin, percent, plain, sentence, table, title, words
from tools.reporting.timings import timing_tables

RUN = ("load", "ok", "refused", "errors", "late", "wrong", "p50_ms", "p99_ms", "p999_ms", "refusal_p99_ms", "ok_rps")
# The longest value of a GPU file that is shown in full.
LONGEST = 300


def serving_tables(part: Results, link: str) -> list[str]:
    """Runs and goals as tables, all else that was measured in a sentence each."""
    facts = part.facts
    runs = sorted(facts["runs"], key=lambda run: run["load"])
    heads = {key: "load, of capacity" if key == "load" else words(key) for key in RUN}
    lines = table({head: [plain(run.get(key)) for run in runs] for key, head in heads.items()}, f"runs of {part.name}")
    groups = {name: facts[name] for name in ("throughput", "churn", "memory") if isinstance(facts.get(name), Mapping)}
    placed = ("runs", "goals", "device", "commit", "versions", *groups)
    lines += ["", origin([facts], part.name, link), "", sentence("Settings and capacity", facts, placed)]
    for name, values in groups.items():
        lines += ["", sentence(title(name), values)]
    return lines + _goals(part)


def peer_tables(part: Results, link: str) -> list[str]:
    """A line a server: pictures a second, the ratio to the peer's, latency alone and at shares of its own capacity."""
    facts, servers = part.facts, part.facts["servers"]
    ratios = facts.get("ratios") or {}
    columns = {
        "server": [f"{row['server']} ({plain(row.get('version'))})" for row in servers],
        "engine": [f"{plain(row.get('engine'))}, {plain(row.get('precision'))}" for row in servers],
        "pictures/s": [number(row["pictures_per_s"]) for row in servers],
        "lowest, highest": [", ".join(map(number, row["pictures_per_s_spread"])) for row in servers],
        "x peer": [number(ratios[row["server"]]) if row["server"] in ratios else "" for row in servers],
        "p50, p99 ms": [f"{plain(row.get('p50_ms'))}, {plain(row.get('p99_ms'))}" for row in servers],
        "lone ms": [plain(row["lone_ms"]) for row in servers],
    }
    for load in sorted({run["load"] for row in servers for run in row["runs"]}):
        runs = [next((run for run in row["runs"] if run["load"] == load), {}) for row in servers]
        columns[f"p50, p99 ms at {load:g}"] = [
            f"{plain(run.get('p50_ms'))}, {plain(run.get('p99_ms'))}" for run in runs
        ]
    placed = ("kind", "servers", "ratios", "goals", "device", "commit", "versions")
    lines = table(columns, f"servers of {part.name}")
    lines += ["", origin([facts], part.name, link), "", sentence("Settings", facts, placed)]
    return lines + _goals(part)


def _goals(part: Results) -> list[str]:
    goals = part.facts.get("goals") or []
    if not goals:
        return []
    columns = {"goal": [str(goal["goal"]) for goal in goals]}
    columns |= {key: [plain(goal.get(key)) for goal in goals] for key in ("limit", "measured", "met")}
    return ["", *table(columns, f"goals of {part.name}")]


def evaluation_tables(part: Results, link: str) -> list[str]:
    lines: list[str] = []
    made = (accuracy_table, summary_table, joint_table, labels_table, *[fields_table] * 3, overlap_table, sweep_table)
    for bench, make in zip(EVALUATIONS, made, strict=True):
        for group in by_origin(part.rows.get(bench, [])):
            for data in sorted({str(row.get("data", "")) for row in group}):
                rows = [row for row in group if str(row.get("data", "")) == data]
                about = f"{_describe(rows)} {origin(rows, part.name, link)}"
                lines += ["", *make(f"{bench} in {part.name}", rows), "", about]
    return lines[1:]


def _describe(rows: Sequence[Row]) -> str:
    """The data, the numbers of images, classes and seeds, and the meaning of ±."""
    first = rows[0]
    if first["bench"] == "block-sweep":
        return "Demo; accuracy on test concepts."
    parts = [f"Data: {first['data']}"]
    for key, what in (("test_images", "test images"), ("images", "images"), ("classes", "classes")):
        if counts := sorted({count for row in rows for count in _as_list(row.get(key))}):
            parts.append(f"{number(counts[0])}{f' to {number(counts[-1])}' * (len(counts) > 1)} {what}")
    if first["bench"] == "accuracy":
        seeds = len(_as_list(first.get("seeds")))
        with_std = any(row.get("std") is not None for row in rows)
        parts.append(f"± std over {seeds} seeds" if with_std else "± binomial standard error of one draw")
    return "; ".join(parts) + "."


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _accuracy(row: Row | None) -> str:
    """The mean in percent ± its standard deviation, or its standard error where only one draw was made."""
    if row is None:
        return ""
    return percent(row["mean"], row["std"] if row.get("std") is not None else row.get("se"))


def _adapter(rows: Sequence[Row]) -> dict[str, list[str]]:
    """A column with the adapter of each row, or none where all rows have the same."""
    names = [row.get("adapter") or "the package's" for row in rows]
    return {"adapter": names} if len(set(names)) > 1 else {}


def accuracy_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """Accuracy in %: one line for a method, reducer and adapter, one column for a number of shots."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["reducer"], row.get("adapter") or ""), []).append(row)
    groups = [lines[key] for key in sorted(lines)]
    first = [group[0] for group in groups]
    columns = {key: [row[key] for row in first] for key in ("method", "reducer")} | _adapter(first)
    columns["tuned on"] = [", ".join(sorted({str(row.get("tuned_on", "")) for row in group})) for group in groups]
    texts = len(columns)
    for k in sorted({row["shots"] for row in rows}):
        cells = [next((row for row in group if row["shots"] == k), None) for group in groups]
        columns[f"{k} shot{'s' * (k != 1)}, %"] = [_accuracy(row) for row in cells]
    return table(columns, summary, texts)


def summary_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """A line for each method, over all data sets and shots of a call; gaps and leads in points."""
    rows = sorted(rows, key=lambda row: (row["gap_mean"] is None, row["gap_mean"], row["method"], row["reducer"]))
    columns = {key: [row[key] for row in rows] for key in ("method", "reducer")}
    columns["cells"] = [number(len(row["at"])) for row in rows]
    columns["accuracy, %"] = [percent(row["mean"], None) for row in rows]
    for key in ("gap_mean", "gap_worst", "log_loss", "auto_ahead_mean", "auto_ahead_worst"):
        columns[words(key)] = [number(row.get(key)) for row in rows]
    return table(columns, summary, 2)


def joint_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """A line for each method and number of shots: all test images together, and those of few classes."""
    rows = sorted(rows, key=lambda row: (row["method"], row["reducer"], row["shots"]))
    columns = {key: [row[key] for row in rows] for key in ("method", "reducer")}
    columns["shots"] = [number(row["shots"]) for row in rows]
    for key in ("alone", "joint"):
        columns[f"{key}, %"] = [percent(row[key], None) for row in rows]
    for key in ("gain", "refused", "few_gain", "few_refused"):
        columns[words(key)] = [number(row[key]) for row in rows]
    return table(columns, summary, 2)


def labels_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """A line for each method: its mean average precision at each number of shots."""
    shots = sorted({row["shots"] for row in rows})
    cells = {(row["method"], row["shots"]): percent(row["map"], row["map_std"]) for row in rows}
    methods = sorted({row["method"] for row in rows})
    columns = {"method": methods}
    columns |= {f"{k} shots, mAP in %": [cells.get((method, k), "") for method in methods] for k in shots}
    return table(columns, summary, 1)


def fields_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """A line for each row: the fields that its bench needs."""
    keys = NEEDED[rows[0]["bench"]][1:]
    columns = {
        words(key): [row[key] if isinstance(row[key], str) else number(row[key]) for row in rows] for key in keys
    }
    return table(columns, summary, sum(isinstance(rows[0][key], str) for key in keys))


def overlap_table(summary: str, rows: Sequence[Row]) -> list[str]:
    rows = sorted(rows, key=lambda row: (row["embeddings"], row.get("adapter") or ""))
    columns = {"embeddings": [row["embeddings"] for row in rows]} | _adapter(rows)
    texts = len(columns)
    columns |= {words(key): [number(row[key]) for row in rows] for key in ("overlap_area", "auroc", "feature_variance")}
    return table(columns, summary, texts)


def sweep_table(summary: str, rows: Sequence[Row]) -> list[str]:
    """One line for a place and width of the adapter: its cost, and the accuracy at the most shots that were tested."""
    place = "first_adapted_block"
    rows = sorted(rows, key=lambda row: (row["bottleneck"] or 0, natural(str(row[place])), str(row.get("epochs"))))
    columns = {words(place): ["no adapter" if row[place] is None else str(row[place]) for row in rows]}
    columns |= {key: [plain(row.get(key)) for row in rows] for key in ("bottleneck", "epochs")}
    for key in ("cost", "cost_arithmetic", "ms_per_image", "overlap_area", "auroc"):
        columns[words(key)] = [number(row.get(key)) for row in rows]
    shots = max(int(k) for row in rows for by_shots in row["test_accuracy"].values() for k in by_shots)
    for method in sorted({method for row in rows for method in row["test_accuracy"]}):
        cells = [row["test_accuracy"].get(method, {}).get(str(shots)) for row in rows]
        columns[f"{method}, {shots} shots, %"] = [_accuracy(cell) for cell in cells]
    return table(columns, summary)


def compiled_table(parts: Sequence[Results], link: str) -> list[str]:
    """Kernels compiled ahead of time, summarised in one line for each file."""

    def span(rows: Sequence[Row], key: str) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        return f"{number(min(values))} to {number(max(values))}" if values else ""

    files = [part.rows["aot"] for part in parts]
    columns = {
        "file": [f"[{part.name}]({link}/{part.name})" for part in parts],
        "sm": [", ".join(map(str, sorted({row["arch"] for row in rows}))) for rows in files],
        "kernels": [number(len({(row["kernel"], row.get("precision")) for row in rows})) for rows in files],
        "rows": [number(len(rows)) for rows in files],
        "registers a thread": [span(rows, "registers") for rows in files],
        "shared bytes": [span(rows, "shared_bytes") for rows in files],
        "rows that spill": [number(sum(bool(row["spills"]) for row in rows)) for rows in files],
    }
    return [*table(columns, "compiled kernels", 2), "", "Compiled, not run; these rows name no device or commit."]


def gpu_tables(part: Results, link: str) -> list[str]:
    """A file of the GPU check: the machine, what is missing, a table for each bench, then the result of each part."""
    facts = part.facts
    about = {key: facts[key] for key in ("torch", "commit", "started", "seconds", "complete") if key in facts}
    lines = [f"### {facts.get('device') or 'device not given'}", "", sentence(f"[{part.name}]({link})", about)]
    if facts.get("trial"):
        lines += ["", "**A trial of the program with tiny shapes, not on a GPU: its times are meaningless.**"]
    for key, heading in (("missing", "Not installed"), ("skipped", "Skipped"), ("failed", "Failed")):
        if key in facts:
            items = [f"- {plain(item)}" for item in facts[key] or []]
            lines += ["", f"{heading}:", "", *items] if items else ["", f"{heading}: nothing."]
    for bench in sorted(part.rows):
        lines += ["", f"#### {title(bench)}", *timing_tables(part.name, link, part.rows[bench])]
    for name, result in (facts.get("parts") or {}).items():
        shown = {key: value for key, value in result.items() if key not in ("tables", "facts", "skipped", "limit_s")}
        shown |= {"last_lines": [line for line in result.get("last_lines") or [] if line.strip(" =")][-1:]}
        shown |= result.get("facts") or {}
        lines += [
            "",
            sentence(title(name), {key: _cut(value) for key, value in shown.items() if value not in ([], {})}),
        ]
        for heading, rows in (result.get("tables") or {}).items():
            keys = list(dict.fromkeys(key for row in rows for key in row))
            columns = {words(key): [_cut(row.get(key)) for row in rows] for key in keys}
            lines += ["", f"{title(name)}, {words(heading)}:", "", *table(columns, f"{heading} in {part.name}")]
    return lines


def _cut(value: Any) -> str:
    """A value as text, or its length if that is long."""
    text = plain(value)
    return text if len(text) <= LONGEST else f"{len(text)} characters, in the file"
