"""Which figures the rows allow, by the section of the page that they stand in."""

from __future__ import annotations

from collections.abc import Sequence

from tools.reporting.bar_charts import pipelines, precisions
from tools.reporting.curves import scalings, throughputs
from tools.reporting.load import Results
from tools.reporting.style import Plot
from tools.reporting.waterfall import waterfalls


def plots(results: Sequence[Results]) -> dict[str, list[Plot]]:
    """The figures that the rows allow, by the section they stand in."""
    return {
        "encoder": waterfalls(results),
        "precision": precisions(results),
        "scaling-encoder": throughputs(results),
        "scaling-score": scalings(results),
        "pipeline": pipelines(results),
    }
