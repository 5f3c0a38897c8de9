"""Candidates that are verified, then timed in turn; rows with the facts that a reader needs to trust a number."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.devices import Call, Device
from benchmarks.show import lines_of, origin
from iosr_fast.evaluation.provenance import write_rows
from iosr_fast.evaluation.table import facts
from iosr_fast.utils.machine import usable_threads

# The threads of an OpenMP pool, and ONNX Runtime's, spin for a while after their last call, on cores that the next
# candidate needs: after a pause of 0.02 s small batches took three times as long as after one of 0.1 s.
PAUSE_S = 0.2
# Shorter calls are timed in bursts: the time of one call among many, with threads awake, is wanted.
BURST_S = 0.02
FEWEST = 3  # rounds of a case, whatever they take


def ready(call: Call) -> Callable[[], Call]:
    """The `prepare` of a candidate that needs none."""
    return lambda: call


def no_check(result: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Candidate:
    """One implementation of a case.

    prepare   returns the call that is timed; what is done once, such as an export, belongs here
    check     takes the call's result and returns further fields of the row; ArithmeticError where it is wrong
    work      of one call, in the unit of the case: GFLOP, GB or images; None where it is unknown
    ceiling   the candidate whose best rate is the ceiling of this one's rate
    rival     the rows of the others have its time over theirs; where it can't run, it is left out with a line
    recorded  whether a GPU replays the call as a CUDA graph; an engine waits for its upload and has its own graphs
    """

    prepare: Callable[[], Call]
    check: Callable[[Any], Mapping[str, Any]] = no_check
    work: float | None = None
    precision: str = "fp32"
    ceiling: str | None = None
    rival: bool = False
    recorded: bool = True


@dataclass(frozen=True)
class Verified:
    """A candidate that is right: its call, the facts of its check, how many calls are a turn, milliseconds of turns,
    seconds until the first result, which holds what is compiled."""

    candidate: Candidate
    call: Call
    facts: Mapping[str, Any]
    burst: int
    first_s: float
    times: list[float] = field(default_factory=list)


@dataclass
class Run:
    """The rows of one subject on one machine: printed as cases end, in the file `out` after every round.

    A case is timed in `repeats` rounds, or in FEWEST where it has taken `seconds` by then.
    """

    subject: str
    device: Device = field(default_factory=Device)
    threads: int = field(default_factory=usable_threads)
    repeats: int = 7
    seconds: float = 45.0
    out: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """A line about what is done now or left out, on stderr."""
        print(f"{self.subject}: {line}", file=sys.stderr, flush=True)

    def case(
        self,
        case: str,
        candidates: Mapping[str, Candidate],
        unit: str = "GFLOP/s",
        packages: Sequence[str] = ("numpy",),
        bursts: bool = True,
    ) -> None:
        """Verify each candidate and time it once, then all in turn: a slow spell of the machine meets all alike.
        A process that is killed keeps the row of each candidate that was timed.

        What is wrong isn't timed and stands in `failed`. Before each turn on a CPU the process sleeps for PAUSE_S. A
        turn is one call; where that is shorter than BURST_S, it is the mean of several (Device.calls_in). Without
        `bursts`, for calls of seconds, nothing is called untimed but the call that is verified.
        """
        timed: dict[str, Verified] = {}
        before, named = len(self.rows), {"bench": self.subject, "case": case}
        shared = {"threads": self.threads, **facts(packages), "device": self.device.description}

        def turn(one: Verified) -> None:
            if not self.device.is_gpu:
                time.sleep(PAUSE_S)
            one.times.append(self.device.time_ms(one.call, one.burst))

        def write() -> None:
            self.rows[before:] = [
                {**named, **row_of(name, timed, unit), **shared, **timed[name].facts} for name in timed
            ]
            self.write()

        for name, candidate in candidates.items():
            if (verified := self._verify(f"{case}: {name}", candidate, bursts)) is not None:
                timed[name] = verified
                turn(verified)
                write()  # the next one may be compiled for minutes
        started = time.perf_counter()
        for count in range(1, self.repeats):
            if count >= FEWEST and time.perf_counter() - started > self.seconds:
                break
            for one in timed.values():
                turn(one)
            write()
        if made := self.rows[before:]:
            print("\n".join([*lines_of(made), "", origin(self.subject, made), ""]), flush=True)

    def _verify(self, label: str, candidate: Candidate, bursts: bool) -> Verified | None:
        """Prepare, call and check a candidate; None, with a line, if it fails."""
        started = time.perf_counter()
        try:
            prepared = candidate.prepare()
            call = self.device.record(prepared) if candidate.recorded else prepared
            called = time.perf_counter()
            result = call()
            self.device.synchronize()
            now = time.perf_counter()
            first_s, call_s = now - started, now - called
            checked = candidate.check(result)
        except ArithmeticError as error:
            self.say(f"WRONG: {label}: {error}; not timed")
            self.failed.append(label)
        except Exception as error:  # also of compilers, which raise what they like
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            self.say(f"left out: {label}: {reason}")
            if not candidate.rival:
                self.failed.append(label)
        else:
            self.say(f"{label}: verified; its first result took {first_s:.3g} s")
            burst = self.device.calls_in(BURST_S, call) if bursts and call_s < 1 else 1
            return Verified(candidate, call, checked, burst, first_s)
        return None

    def write(self) -> None:
        """Write all rows to `out`: a process that is killed loses no round that has ended."""
        if self.out is not None:
            write_rows(self.out, self.rows)


def row_of(name: str, timed: Mapping[str, Verified], unit: str) -> dict[str, Any]:
    """A candidate's part of its row, JSON-timed.

    runtime_ms is the median, runtime_ms_spread the 10th and 90th percentile, first_s the seconds until the first
    result: of exports, compiling and one call. ratios has each rival's median over this
    row's (above 1: this row is faster). share_of_ceiling is `rate` over the best rate of the candidate's ceiling in the
    same rounds.
    """
    own, median = timed[name], statistics.median(timed[name].times)
    rate = None if own.candidate.work is None else own.candidate.work / median * 1e3
    ceiling, top = timed.get(own.candidate.ceiling or ""), None
    if rate is not None and ceiling is not None and ceiling.candidate.work is not None:
        top = ceiling.candidate.work / min(ceiling.times) * 1e3
    rivals = {} if name.startswith("ceiling-") else {key: one for key, one in timed.items() if one.candidate.rival}
    return {
        "impl": name,
        "precision": own.candidate.precision,
        "runtime_ms": round(median, 4),
        "runtime_ms_spread": [round(float(np.percentile(own.times, q)), 4) for q in (10, 90)],
        "repeats": len(own.times),
        "first_s": round(own.first_s, 3),
        "ratios": {key: round(statistics.median(one.times) / median, 3) for key, one in rivals.items() if key != name},
        "rate": None if rate is None else round(rate, 3),
        "rate_unit": None if rate is None else unit,
        "ceiling": None if top is None else round(top, 3),
        "share_of_ceiling": None if rate is None or top is None else round(rate / top, 4),
    }
