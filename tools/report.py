"""Make benchmarks/README.md from benchmarks/results: python tools/report.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
KEYS = ("bench", "device", "data", "seeds")  # of a table: rows that are equal in these
Row = Mapping[str, Any]

# Files in the order of the page, and what their figures are. Times are medians in ms (10th to 90th percentile).
SUBJECTS = {
    "encoder": "Times of both embeddings of a batch (b). `-sN`: adapters from block N on.",
    "precision": "Times of the encoder in fewer bits; the smallest cosine to fp32.",
    "score": "Times of scoring: queries (q), keys (k), width (d), classes (c); keys with values or classes.",
    "pipeline": "Times of folders of JPEG files to labels.",
    "one-file": "Times of a decoded picture by one ONNX file; busy machine.",
    "cold-start": "Times from a process's start to its first label.",
    "classifier": "Times of pictures in memory to labels of 100 classes.",
    "fit": "Times of fitting a classifier on pictures.",
    "search": "Times of choosing parameters. The public grid is extrapolated from 40 of its points.",
    "train": "Times of an epoch of an adapter's training.",
    "updates": "Times of changes of a running classifier.",
    "serving": "The server under load, as shares of its capacity.",
    "classifiers": "One server of many classifiers (one) beside as many servers (each).",
    "serving-peer": "The server beside infinity-emb.",
    "ray": "One process and two of Ray; busy machine.",
    "texts": "What class names are worth, beside scikit-learn; deviation over draws.",
    "photographs": "The encoder without a download on photographs, beside scikit-learn; deviation over draws.",
    "descriptions": "Accuracy on the demo's held-out concepts by what texts are made of.",
    "accuracy-caltech70": "Accuracy in %; ±: standard error of one draw.",
    "accuracy-embeddings": "Accuracy in % beside scikit-learn, with and without texts.",
    "accuracy-demo": "Accuracy in % on the demo's held-out concepts; ±: deviation over seeds.",
    "accuracy-demo-shift": "The same with support and queries in different styles.",
    "unequal": "Accuracy in % where half of the classes have a quarter of the images.",
    "joint": "A folder judged jointly, beside each image alone.",
    "labels": "Several labels a picture; by promise: of all labels those accepted, of accepted ones wrong, draws that "
    "break it.",
    "audit": "Wrong labels in the support set.",
    "suggest": "Accuracy after a budget of labels, suggested and at random (mean of ten, its error).",
    "automation": "What is said, and what is true; by promise: labels accepted, of these wrong, draws that break it.",
    "tree": "The same with a tree, and flat: answered (classes alone)/wrong/broken; of made-up logits, too.",
    "parts": "Accuracy on scenes by what of them is looked at; deviation over seeds.",
    "adapter-place": "Accuracy in % by the adapter's place in the demo's CLIP.",
    "dino": "Accuracy in % of an adapter trained with DINO, without labels.",
}
SUBJECTS |= {f"gpu-{name}": f"On a GPU. {SUBJECTS[name]}" for name in ("encoder", "score", "pipeline")}
# What the rows of `make gpu-check` decide, and nothing before: an open question, and its rows.
OPEN = {
    "half precision as the default on a GPU": "encoder: `torch`, `torch-fp32`; score: `:default`",
    "`max_batch` of 256": "encoder: `torch-engine`, `tensorrt-engine` at b128 and b256",
    "one batch in flight (`files/stream.py`)": "encoder: `torch-engine` over `torch` at b32",
    "CUDA uint8 tensors for `encode_on_device`": "encoder: `torch-engine` minus `torch` at b128",
    "the fused encoder by torch.compile": "encoder: `torch-compile` over `torch`; the seconds of its first call",
    "a timing cache for plans": "encoder: `build_seconds` of `tensorrt-engine`",
    "values in two products through L2": "score, c1000-values: `eager-best`, through memory, over `triton/values:fp16`",
    "queries up to which CUDA scores": "score: `cuda`, `triton` at q1",
}
# Of benches whose rows are lines: the first columns, where a row has them, and the others, with their formats.
FIRST = {"case": "", "impl": "", "ms": "", "server": "", "load": ".0%", "method": "", "of": "", "shots": ""}
LATENCIES = {"p50_ms": ".1f", "p99_ms": ".1f", "lone_ms": ".1f"}
RATIOS = {"p99_of_lone": ".1f", "change_p50_ms": ".1f"}
RATIOS |= {f"{name}_of_rival": ".2f" for name in ("rps", "p50", "p99", "change")}
OF_PROMISE = "{{labelled_{0}:.1%}}/{{wrong_{0}:.1%}}/{{broken_{0}:.0%}}"
OF_LEVELS = "{{labelled_{0}:.1%}}({{level0_{0}:.1%}})/{{wrong_{0}:.2%}}/{{broken_{0}:.1%}}"
COLUMNS: dict[str, dict[str, str]] = {
    "precision": {"min_cosine": ".4f", "file_mb": ".0f", "accuracy": ".1%"},
    "pipeline": {"images_per_s": ".1f", "memory_mb": ".0f"},
    "cold-start": {"peak_memory_mb": ".0f"},
    "serving": {"ok": ",", "refused": ",", "ok_rps": ".0f", **LATENCIES, **RATIOS},
    "classifiers": {"classifiers": "", "ok_rps": ".1f", **LATENCIES, "of_one": ".2f", "memory_mb": ".0f"},
    "serving-peer": {"pictures_per_s": ".1f", "ok_rps": ".1f", **LATENCIES, **RATIOS},
    "ray": {"ok_rps": ".0f", "images_per_s": ".1f"},
    **{name: {"accuracy": ".1%", "std": ".1%"} for name in ("texts", "photographs", "descriptions", "parts")},
    "key-precision": {
        **{"changed": ".2%", "accuracy": ".2%", "narrow": ".2%", "moved": ".2%", "answered": ".1%", "broken": ".1%"},
    },
    "joint": {"alone": ".1%", "joint": ".1%", "refused": ".0%"},
    "labels": {
        **{"map": ".1%", "expected": ".1%", "rival": ".1%", "said/precision": "{said:.1%}/{precision:.1%}"},
        **{"found": ".1%", "warned": ".0%"},
        **{promise: OF_PROMISE.format(promise) for promise in ("1%", "5%", "10%")},
        **{"breaks/made": "{breaks}/{made}", "p": ".2g"},
    },
    "audit": {"auroc": ".4f", "precision": ".1%", "wrong": ".0f", "listed": ".1f", "found": ".1f"},
    "suggest": {"suggested": ".1%", "random": ".1%", "random_se": ".1%"},
    "automation": {
        "own/true/alike": "{own:.1%}/{true:.1%}/{alike:.1%}",
        **{"in_range": ".0%", "own/true_loss": "{own_loss:.3f}/{loss:.3f}", "error": ".1%", "covered": ".1%"},
        "warned/untold/refused": "{warned:.0%}/{untold:.0%}/{refused:.0%}",
        **{promise: OF_PROMISE.format(promise) for promise in ("1%", "2%", "5%", "10%")},
        **{"breaks/made": "{breaks}/{made}", "p": ".2g", "auroc": ".1%"},
        **{"kept/rejected": "{kept:.1%}/{rejected:.1%}", "strangers/both": "{strangers:.1%}/{both:.1%}"},
    },
    "tree": {promise: OF_LEVELS.format(promise) for promise in ("1%", "2%", "5%", "10%")},
}


def page(folder: Path = RESULTS) -> str:
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    if unknown := sorted(files.keys() - SUBJECTS.keys()):
        raise ValueError(f"expected the subjects of {__file__}, got {', '.join(unknown)}; name them there")
    lines = [
        "# Benchmarks\n",
        "Made from the rows in `results` by `tools/report.py`. Candidates were checked against a reference, then",
        "timed in turn. Compare within a table: machines differ. No GPU was measured.",
    ]
    for name in filter(files.get, SUBJECTS):
        lines += ["", f"## {name}", "", SUBJECTS[name]]
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in files[name]:
            if row["bench"] not in ("summary", "overlap"):
                groups.setdefault(tuple(str(row.get(key)) for key in KEYS), []).append(row)
        for rows in groups.values():
            lines += ["", *lines_of(rows), "", origin(name, rows)]
    lines += ["", "## gpu-check", "", "What the first rows of `make gpu-check` decide:", ""]
    lines += table(["open", "rows"], OPEN.items())
    return "\n".join(lines) + "\n"


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The table of one bench, machine and data set: a line for each row, or for each method or implementation."""
    bench = rows[0]["bench"]
    if bench in COLUMNS:
        timed = [{**row, "ms": milliseconds(row)} if "runtime_ms" in row else row for row in rows]
        flat = [{**row, **part} for row in timed for part in row.get("servers") or row.get("runs") or [row]]
        formats = {**FIRST, **COLUMNS[bench]}
        formats = {name: form for name, form in formats.items() if name not in said_once(rows)}
        shown = [name for name in formats if any(cell(row, name, formats[name]) for row in flat)]
        return table(shown, [[cell(row, name, formats[name]) for name in shown] for row in flat])
    if "runtime_ms" in rows[0]:
        cells = {(row["impl"], row["case"]): milliseconds(row) for row in rows}
    else:
        cells = {(method(row), f"{row.get('of', '')} {row['shots']}-shot".strip()): percent(row) for row in rows}
    heads = list(dict.fromkeys(head for _, head in cells))
    names = dict.fromkeys(name for name, _ in cells)
    return table(["", *heads], [[name, *(cells.get((name, head), "") for head in heads)] for name in names])


def said_once(rows: Sequence[Row]) -> dict[str, Any]:
    """What all rows of a claim have in common, which stands below their table."""
    names = ("method", "shots") if rows[0]["bench"] in COLUMNS and len(rows) > 1 else ()
    return {name: rows[0][name] for name in names if name in rows[0] and len({row[name] for row in rows}) == 1}


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    first = [[head.replace("_", " ") for head in heads], ["---"] * len(heads)]
    return ["| " + " | ".join(line) + " |" for line in (*first, *lines)]


def cell(row: Row, name: str, form: str) -> str:
    """The row's figure of this name, or those that the form names; nothing where it has none."""
    try:
        return form.format_map(row) if "{" in form else format(row[name], form)
    except (KeyError, TypeError):
        return ""


def milliseconds(row: Row) -> str:
    spread = row.get("runtime_ms_spread")
    return f"{row['runtime_ms']:.4g}" + (f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else "")


def percent(row: Row) -> str:
    return f"{100 * row['mean']:.1f} ± {100 * (row.get('se') if row['std'] is None else row['std']):.1f}"


def method(row: Row) -> str:
    parts = [row["method"], *({row.get("reducer", "none")} - {"none", "auto"})]
    if "bottleneck" in row:
        block, width, epochs = (row[name] for name in ("first_adapted_block", "bottleneck", "epochs"))
        parts.append("no adapter" if block is None else f"from block {block}, width {width}, {epochs} epochs")
    return ", ".join(parts)


def origin(name: str, rows: Sequence[Row]) -> str:
    """Of a table: file, data, numbers of test images and draws, what its rows have in common, machine and commits; the
    rows have the versions."""
    parts = [f"[{name}.json](results/{name}.json)"]
    if "data" in rows[0]:
        counts = " or ".join(map(str, sorted({n for row in rows for n in np.ravel(row["test_images"])})))
        parts += [rows[0]["data"], f"test images: {counts}", f"draws: {np.size(rows[0]['seeds'])}"]
    parts += [f"{name}: {value}" for name, value in said_once(rows).items()]
    return "; ".join([*parts, rows[0]["device"], ", ".join(sorted({row["commit"] for row in rows}))])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(f"error: expected no arguments, got {' '.join(sys.argv[1:])}; it writes benchmarks/README.md")
    (RESULTS.parent / "README.md").write_text(page(), encoding="utf-8")
