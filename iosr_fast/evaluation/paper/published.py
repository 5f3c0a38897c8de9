"""Published figures, each with its source, and which of them a result may be compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from iosr_fast.evaluation.accuracy import Figure
from iosr_fast.exceptions import IosrFastError

SHIPPED = Path(__file__).parent / "published.json"
SCHEMA = 1
NO_SHOTS = 0  # the key of zero-shot figures
# The paper whose experiments these are.
ARXIV = "2409.11338"
PAPER = f"Kravets & Namboodiri, BMVC 2024 (arXiv {ARXIV})"


# (data set, method, backbone, pretrained tag, shots) -> figures, several if sources disagree.
Key = tuple[str, str, str, str, int]
Published = Mapping[Key, tuple[Figure, ...]]


def read_published(paths: Iterable[Path] = ()) -> Published:
    """The shipped figures, and those of `paths`, which have the same form:

        {"schema": 1, "sources": [{"paper": ..., "url": ..., "where": ..., "note": ..., "backbone": "RN50",
         "pretrained": "openai", "figures": {data set: {method: {shots: accuracy in percent}}}}]}

    Raises FileNotFoundError, and ValueError naming the file and what is wrong in it.
    """
    published: dict[Key, tuple[Figure, ...]] = {}
    for path in (SHIPPED, *paths):
        if not path.is_file():
            raise FileNotFoundError(f"no file of published figures at {path}")
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if whole["schema"] != SCHEMA:
                raise IosrFastError(f"expected schema {SCHEMA}, got {whole['schema']}")
            for source in whole["sources"]:
                for key, figure in _figures(source):
                    published[key] = (*published.get(key, ()), figure)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise IosrFastError(f"{path} is not a file of published figures: {reason}") from error
    return published


def _figures(source: dict[str, Any]) -> Iterable[tuple[Key, Figure]]:
    words = {name: source[name] for name in ("paper", "url", "where", "backbone", "pretrained")}
    if empty := [name for name, value in words.items() if not isinstance(value, str) or not value.strip()]:
        raise IosrFastError(f"expected every source with {', '.join(empty)}, got {source.get('paper')!r} without")
    for data, methods in source["figures"].items():
        for method, by_shots in methods.items():
            for shots, value in by_shots.items():
                if not isinstance(value, int | float) or not 1.0 < value <= 100.0:
                    raise IosrFastError(
                        f"expected accuracies in percent, above 1 and up to 100, got {value!r} ({data}, {method})"
                    )
                if (int(shots) == NO_SHOTS) != (method == "zero-shot") or int(shots) < 0:
                    raise IosrFastError(
                        f"expected shots of at least 1, and {NO_SHOTS} for zero-shot; got {shots} for {method}"
                    )
                key = (data, method, backbone(words["backbone"]), words["pretrained"], int(shots))
                yield key, Figure(float(value), words["paper"], words["url"], words["where"], source.get("note", ""))


def backbone(model: str) -> str:
    """ViT-B-16 for ViT-B/16 and for ViT-B-16-quickgelu: OpenAI's weights always have QuickGELU."""
    return model.replace("/", "-").removesuffix("-quickgelu")


def comparable(
    published: Published, data: str, method: str, reducer: str, shots: int, model: str, pretrained: str | None
) -> tuple[Figure, ...]:
    """The figures for the same data set, method, backbone, weights and shots; none for a method with a reducer."""
    if reducer != "none" or pretrained is None:
        return ()
    counted = NO_SHOTS if method == "zero-shot" else shots
    return published.get((data, method, backbone(model), pretrained, counted), ())
