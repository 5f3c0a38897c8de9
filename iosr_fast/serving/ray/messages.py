"""What a replica answers to those who pass requests on to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from iosr_fast.serving.ray.source import Source
from iosr_fast.state.predictions import Prediction


@dataclass(frozen=True)
class Facts:
    """Which replica answers, and with what."""

    replica: str
    pid: int
    host: str
    source: Source
    version: int  # of the classifier's state
    image_size: int
    classes: int
    pending: int = 0  # images that it has accepted and not answered
    refused: str = ""  # why the last update was not taken, "" where it was


@dataclass(frozen=True)
class Reply:
    """`status` is "ok" (then `results` has each image's prediction or what is wrong with it), "full", "closed" or
    "failed" (the engine); in the last three cases another replica may do it."""

    status: str
    facts: Facts
    results: list[Prediction | Exception] = field(default_factory=list)
    message: str = ""
    retry_after_s: float = 0.0
