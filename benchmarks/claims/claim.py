"""What the measurements of claims share: data sets on the command line, a printed line for each row, rows as JSON."""

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.show import lines_of
from iosr_fast import Embeddings, FewShotHead
from iosr_fast.cli.command import new_file, one_line_errors
from iosr_fast.evaluation.features import open_sources
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.evaluation.table import facts

Task = Any  # iosr_fast.evaluation.tasks.Task, or one with labels (B, C)
Draws = Iterator[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """What `draws` measures of a task, a method and a seed: figures, shares in 0..1. A row has their means over all
    draws, and the standard deviation of the first; draws that differ in `of` have a row each. `sources` opens data
    sets by name, shots and number of seeds. `pool` makes what a row has of all its draws together: the draws, or less
    where they are many."""

    name: str
    about: str
    draws: Callable[[Task, str, int], Draws]
    methods: Sequence[str] = ("auto",)
    sources: Callable[..., Sequence[Any]] = open_sources
    pool: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] = lambda draws: {"draws": draws}

    def main(self, words: Sequence[str] | None = None) -> list[dict[str, Any]]:
        program = f"python -m benchmarks.claims {self.name}"
        parser = argparse.ArgumentParser(program, description=self.about, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("data", nargs="*", default=["demo"], help="feature files (.npz), or demo")
        parser.add_argument("--shots", nargs="+", type=int, help="images of each class; default: all that there are")
        parser.add_argument("--seeds", type=int, help="draws of the support set; default: the file's own set")
        parser.add_argument("--json", type=Path, required=True, help="write the rows here")
        options = parser.parse_args(words)
        warnings.simplefilter("ignore")  # of scikit-learn, of fits on few images
        with one_line_errors():
            new_file(options.json)
            rows = []
            for source in self.sources(options.data, options.shots, options.seeds):
                for row in self.rows(source):
                    print(f"{row['data']}, {lines_of([row])[0]}", flush=True)
                    rows.append({**row, **facts(["scikit-learn"])})
                write_rows(options.json, rows)  # of each data set, as a run may be ended
            return rows

    def rows(self, source: Any) -> Iterator[dict[str, Any]]:
        """The rows of a data set, JSON-ready."""
        for method in self.methods:
            for shots in source.shots:
                groups: dict[str, list[Mapping[str, Any]]] = {}
                for seed in source.seeds:
                    task = source.draw(shots, seed)
                    for draw in self.draws(task, method, seed):
                        groups.setdefault(draw.get("of", ""), []).append(draw)
                for of, draws in groups.items():
                    figures = {name: [draw[name] for draw in draws] for name in draws[0] if name != "of"}
                    first = next(iter(figures.values()))
                    yield {
                        **{"bench": self.name, "data": source.name, "method": method, "of": of, "shots": shots},
                        **{name: None if None in v else float(np.mean(v)) for name, v in figures.items()},
                        "std": float(np.std(first, ddof=1)) if len(first) > 1 else None,
                        **{"test_images": len(task.labels), "seeds": list(source.seeds)},
                        **self.pool(draws),
                    }


def fit(
    images: Embeddings, labels: np.ndarray, text: Any, tau: float, method: str = "auto", groups: Any = None, **more: Any
) -> FewShotHead:
    """The head that a user gets of these images; gda, a Gaussian fit, at its defaults."""
    tune: Any = "none" if method == "gda" else None
    head = FewShotHead(method, tune=tune, text=text, tau=tau, adapted=images.adapted is not None, **more)
    return head.fit(rows_of(images), labels, groups=groups)


def rows_of(embeddings: Embeddings) -> np.ndarray:
    """(N, D), or (N, 2 D) with the adapted embeddings at the right."""
    return np.hstack([part for part in (embeddings.plain, embeddings.adapted) if part is not None])
