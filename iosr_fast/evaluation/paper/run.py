"""The paper's tables (Kravets & Namboodiri, BMVC 2024, arXiv 2409.11338): checks, missing cells, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from iosr_fast.evaluation.comparison import GROUPS, Comparison, compare, method_names, pairs_of
from iosr_fast.evaluation.demo import torch_encoder
from iosr_fast.evaluation.paper.cells import FileCells
from iosr_fast.evaluation.paper.data import open_paper_sets
from iosr_fast.evaluation.paper.embeddings import KeptEmbeddings, digest
from iosr_fast.evaluation.paper.published import figures_of
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.evaluation.rivals import ADAPTED
from iosr_fast.evaluation.table import console, facts, place, print_comparison, print_means
from iosr_fast.exceptions import IosrFastError
from iosr_fast.sealed.files import cache_folder, remove_leftovers

PAPER_METHODS = ("zero-shot", "tip-adapter", "tip-adapter++", "tip-x", "tip-x++")


def run(
    root: Path,
    data: Sequence[str],
    model: str,
    pretrained: str | None,
    adapter: str,
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    views: int,
    out: Path | None,
    report: Callable[[str], None],
) -> None:
    """Check everything, then fill the missing cells, print the tables and write results.json.

    The parameters are the options of `iosr-fast evaluate paper`. A run of another CLIP, adapter or number of views has
    another folder in `out`.
    """
    from iosr_fast.backbones.load import load_clip
    from iosr_fast.export.pretrained import choose_adapter

    names = method_names(methods, {"paper": PAPER_METHODS, **GROUPS})
    sets, shots = open_paper_sets(data, root), sorted(set(shots))
    if few := [f"{one.name} has {one.available.max()}" for one in sets if one.available.max() < shots[-1]]:
        actual = f"got {shots[-1]}: {', '.join(few)}"
        raise IosrFastError(f"expected --shots up to the images of the largest class, {actual}")
    clip = load_clip(model, pretrained)
    loaded = choose_adapter(clip, adapter)
    without = [name for name in names if name.endswith(ADAPTED)] if loaded is None else []
    reason = f"no adapter for {clip.name}: give --adapter FILE (iosr-fast train-adapter --preset paper trains one)"
    if named := [name for name in without if name in methods]:
        raise IosrFastError(f"{', '.join(named)}: {reason}")
    if without:
        report(f"left out: {', '.join(without)}: {reason}")
    of_run = {
        "model": clip.name,
        "clip": clip.fingerprint,
        "adapter": None if loaded is None else loaded.fingerprint(),
        "size": clip.image_size,
        **clip.geometry.changes(),
        "views": views,
    }
    folder = (out or cache_folder() / "paper") / f"{clip.name}-{digest(of_run)[:12]}"
    remove_leftovers(folder / "embeddings")  # of killed runs
    embeddings = KeptEmbeddings(folder / "embeddings", clip, torch_encoder(clip, loaded), of_run, report)
    cells = FileCells(folder / "cells", {one.name: one.fingerprint for one in sets}, report)
    pairs = pairs_of([name for name in names if name not in without], ["none"])
    comparisons = []
    for one in sets:
        comparisons.append(compare(one.as_source(embeddings, views, shots, range(1, seeds + 1)), pairs, report, cells))
        print_beside_published(console(), comparisons[-1], clip.name, pretrained)
    shifted = {one.name for one in sets if one.shifted}
    print_means(console(), [comparison for comparison in comparisons if comparison.source.name not in shifted])
    common = {**of_run, "pretrained": pretrained, **facts(("torch", "open_clip_torch"))}
    rows = [{**result.row(), **common} for comparison in comparisons for result in comparison.results]
    write_rows(folder / "results.json", rows)
    report(f"wrote {folder / 'results.json'}")


def print_beside_published(out: Console, comparison: Comparison, model: str, pretrained: str | None) -> None:
    """The tables of a set; below an accuracy the published ones, and by how many points it exceeds them."""
    cells: dict[tuple[str, str, int], str] = {}
    sources: dict[str, float] = {}
    for result in comparison.results:
        figures = figures_of(result.source, result.method, result.shots, model, pretrained)
        cells[place(result)] = " / ".join(f"{v:.1f} ({100 * result.mean - v:+.1f})" for v in figures.values())
        sources |= figures
    print_comparison(out, comparison, cells)
    for source in sources:
        out.print(f"  published: {source}", soft_wrap=True)
    if sources:
        out.print("  Splits, prompts and draws may differ from the papers'. In parentheses: points above them.")
