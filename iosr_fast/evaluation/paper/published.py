"""Published figures (published.json), and which of them a result may be compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NO_SHOTS = "0"  # the key of zero-shot figures


def sources() -> list[dict[str, Any]]:
    """Each with paper, url, where, note, backbone, pretrained and figures: {data set: {method: {shots: percent}}}."""
    content = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = content["sources"]
    return found


def figures_of(data: str, method: str, shots: int, model: str, pretrained: str | None) -> dict[str, float]:
    """Accuracies in percent for the same data set, method, backbone, weights and shots, by their sources in words.

    ViT-B-16 is ViT-B-16-quickgelu: OpenAI's weights always have QuickGELU. The weights of a file have no figures.
    """
    found = {}
    for source in sources():
        by_shots = source["figures"].get(data, {}).get(method, {})
        value = by_shots.get(NO_SHOTS if method == "zero-shot" else str(shots))
        same = (source["backbone"], source["pretrained"]) == (model.removesuffix("-quickgelu"), pretrained)
        if same and value is not None:
            note = f"; {source['note']}" if source["note"] else ""
            found[f"{source['paper']}, {source['where']}{note}: {source['url']}"] = float(value)
    return found
