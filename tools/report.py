"""Make benchmarks/README.md and its figures from the rows in benchmarks/results.

    python tools/report.py            # write them
    python tools/report.py --check    # exit 1 where the page is not what the rows give

The page is a function of the rows, byte for byte. The bytes of a figure depend on matplotlib's version, so --check only
looks that each figure is there and that there is no other.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from tools.command import new_app, start
from tools.reporting.load import BrokenResults, read_results
from tools.reporting.page import PAGE, PLOTS, pages
from tools.reporting.style import Plot

app = new_app(help=__doc__)
ROOT = Path(__file__).resolve().parent.parent


def write(page: str, plots: list[Plot], out: Path) -> None:
    """The page, its figures, and no figure of before."""
    folder = out / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for stale in set(folder.glob("*.png")) - {folder / plot.file for plot in plots}:
        stale.unlink()
    for plot in plots:
        plot.draw(folder / plot.file)
    (out / PAGE).write_text(page, encoding="utf-8")


def differences(page: str, plots: list[Plot], out: Path) -> list[str]:
    """What is not as the rows give it; empty where all is."""
    path = out / PAGE
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    told = [
        line
        for line in difflib.unified_diff(found.splitlines(), page.splitlines(), str(path), "the rows", n=0, lineterm="")
    ]
    if not told and found != page:
        told.append(f"{path}: line endings or the last line differ")
    shown = {out / PLOTS / plot.file for plot in plots}
    told += [
        f"{figure}: missing or empty" for figure in sorted(shown) if not figure.is_file() or not figure.stat().st_size
    ]
    return told + [f"{stale}: no row asks for it" for stale in sorted(set((out / PLOTS).glob("*.png")) - shown)]


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="The folder of JSON files.")] = ROOT / "benchmarks" / "results",
    out: Annotated[Path, typer.Option(help="Where README.md and plots/ go.")] = ROOT / "benchmarks",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where the page is not what the rows give.")
    ] = False,
) -> None:
    """Make the page of benchmarks, or check that it is what the rows give."""
    try:
        page, plots = pages(read_results(results), results, out)
    except BrokenResults as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if not check:
        write(page, plots, out)
        typer.echo(f"wrote {out / PAGE} and {len(plots)} figures")
        return
    told = differences(page, plots, out)
    if told:
        typer.echo("\n".join(told[:40]), err=True)
        typer.echo("error: the page is not what the rows give; python tools/report.py makes it again", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    start(app)
