"""The data sets of `iosr-fast evaluate features`: feature files, and the demo's pictures by the word `demo`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from iosr_fast.clip.demo.pictures import POOL
from iosr_fast.evaluation import demo
from iosr_fast.evaluation.features import read_features
from iosr_fast.evaluation.tasks import Source
from iosr_fast.exceptions import IosrFastError

DEMO = "demo"
DEMO_SEEDS = 3


def open_sources(
    words: Sequence[str], shots: Sequence[int] | None = None, seeds: int | None = None, use_text: bool = True
) -> list[Source]:
    """A Source for each path of a feature file, or `demo`. `seeds` None: 1 for a file, DEMO_SEEDS for the demo.

    Beside files the demo leaves out the numbers of shots that it has not. Raises IosrFastError and OSError as
    read_features, and for sets of the same name, which the tables can't tell apart.
    """
    sources = [_open(word, shots, seeds, use_text, alone=len(words) == 1) for word in words]
    counts = Counter(source.name for source in sources)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise IosrFastError(f"expected data sets of different names, got {', '.join(twice)} more than once; rename one")
    return sources


def _open(word: str, shots: Sequence[int] | None, seeds: int | None, use_text: bool, alone: bool) -> Source:
    if word != DEMO:
        return read_features(word, shots, seeds or 1, use_text)
    if not use_text:
        raise IosrFastError("expected feature files with --no-text, got demo")
    left_out = [] if alone or shots is None else [k for k in shots if k > POOL]
    wanted = [k for k in dict.fromkeys(shots or demo.SHOTS) if k not in left_out]
    demo.check_shots(wanted)
    encoded, _ = demo.encode_test()
    source = demo.in_domain(encoded, wanted, range(seeds or DEMO_SEEDS))
    notes = (f"the demo has {POOL} images a class for support: without {left_out} shots",) if left_out else ()
    return replace(source, notes=notes)
