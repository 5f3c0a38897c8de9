"""Make benchmarks/README.md and its figures from the rows in benchmarks/results.

    python tools/report.py            # write them
    python tools/report.py --check    # exit 1 if the page differs from what the rows give

The page is a function of the rows, byte for byte. The bytes of a figure depend on matplotlib's version, so --check only
checks that every figure exists and that there is no other.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from iosr_fast.utils.command import new_app
from tools.reporting.charts import Chart
from tools.reporting.load import BrokenResults, read_results
from tools.reporting.page import PAGE, PLOTS, pages

app = new_app(help=__doc__)
ROOT = Path(__file__).resolve().parent.parent


def write(page: str, figures: list[Chart], out: Path) -> None:
    """Write the page and its figures, and remove other figures."""
    folder = out / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.png")) - {folder / figure.file for figure in figures}:
        stale.unlink()
    for figure in figures:
        figure.draw(folder / figure.file)
    (out / PAGE).write_text(page, encoding="utf-8")


def differences(page: str, figures: list[Chart], out: Path) -> list[str]:
    """The lines and figures that differ from what the rows give, empty if none do."""
    path = out / PAGE
    current = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = list(difflib.unified_diff(current.split("\n"), page.split("\n"), str(path), "the rows", n=0, lineterm=""))
    expected = {out / PLOTS / figure.file for figure in figures}
    lines += [f"{path}: missing or empty" for path in sorted(expected) if not path.is_file() or not path.stat().st_size]
    return lines + [f"{path}: no row asks for it" for path in sorted(set((out / PLOTS).glob("*.png")) - expected)]


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="The folder of JSON files.")] = ROOT / "benchmarks" / "results",
    out: Annotated[Path, typer.Option(help="Where README.md and plots/ go.")] = ROOT / "benchmarks",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if the page differs from what the rows give.")
    ] = False,
) -> None:
    """Make the page of benchmarks, or check that it is what the rows give."""
    try:
        page, figures = pages(read_results(results), results, out)
    except BrokenResults as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if not check:
        write(page, figures, out)
        typer.echo(f"wrote {out / PAGE} and {len(figures)} figures")
    elif lines := differences(page, figures, out):
        typer.echo("\n".join(lines[:40]), err=True)
        typer.echo("error: the page is not what the rows give; python tools/report.py makes it again", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
