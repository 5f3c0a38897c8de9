"""The files that tools/gpu_check.py writes: rows by bench, what each part found, failed at or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.reporting.load import Results, Row
from tools.reporting.text import folded, plain, table, words
from tools.reporting.timings import timing_tables

LONGEST = 300
LISTS = {"missing": "Not installed", "skipped": "Skipped", "failed": "Failed"}


def gpu_tables(results: Results, link: str) -> list[str]:
    """One file: what it ran on, what it lacked, a table for each bench of its rows, then what its parts say."""
    facts = results.facts
    lines = ["", f"### {facts.get('device') or 'device not told'}", ""]
    about = ("torch", "commit", "started", "seconds", "complete")
    told = [f"{words(key)} {plain(facts[key])}" for key in about if facts.get(key) is not None]
    lines += [f"File: [{results.name}]({link}){'; ' if told else ''}{'; '.join(told)}."]
    if facts.get("trial"):
        lines += ["", "**A trial of the program with tiny shapes, not on a GPU: its times say nothing.**"]
    for key, title in LISTS.items():
        if key in facts:
            found = [f"- {plain(one)}" for one in facts[key] or []]
            lines += ["", f"{title}:", "", *found] if found else ["", f"{title}: nothing."]
    by_bench: dict[str, list[Row]] = {}
    for section, rows in results.rows.items():
        for row in rows:
            by_bench.setdefault(str(row.get("bench", section)), []).append(row)
    for bench in sorted(by_bench):
        lines += ["", f"#### {words(bench.replace('-', '_')).capitalize()}"]
        lines += timing_tables(results.name, link, by_bench[bench])
    parts = facts.get("parts") or {}
    said = {"kind", "device", "trial", "parts", *about, *LISTS, *results.rows}
    for name, part in {**{key: value for key, value in facts.items() if key not in said}, **parts}.items():
        lines += ["", *_part(name, part, results.name)]
    return lines


def _part(name: str, part: Any, file: str) -> list[str]:
    """A part or an old section: how it ended, its facts and its tables."""
    title = words(name).capitalize()
    if part in ([], {}, None):
        return [f"{title}: nothing came."]
    if not isinstance(part, Mapping):
        return [f"{title}: {_cut(part)}."]
    facts = {
        key: value for key, value in part.items() if key not in ("facts", "tables", "last_lines", "skipped", "limit_s")
    }
    facts |= part.get("facts") or {}
    last = [line for line in part.get("last_lines") or [] if line.strip(" =")][-1:]
    told = [f"{words(key)} {_cut(value)}" for key, value in facts.items() if value not in (None, [], {})]
    told += [f"last line `{line.strip(' =').replace('`', chr(39))}`" for line in last]
    lines = [f"{title}: {'; '.join(told)}."]
    for heading, rows in (part.get("tables") or {}).items():
        lines += ["", f"{title}, {words(heading)}:", "", *_flat_table(rows, f"{heading} in {file}")]
    return lines


def _flat_table(rows: Sequence[Row], summary: str) -> list[str]:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    texts = next(
        (i for i, key in enumerate(heads) if not all(isinstance(row.get(key), str) for row in rows)), len(heads)
    )
    made = table([words(key) for key in heads], [[_cut(row.get(key)) for key in heads] for row in rows], max(1, texts))
    return folded(made, summary, len(rows))


def _cut(value: Any) -> str:
    """A value in words; of a long one how long it is."""
    told = plain(value)
    return told if len(told) <= LONGEST else f"{len(told)} characters, in the file"
