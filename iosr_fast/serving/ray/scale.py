"""How many replicas there are, and what each of them gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """Checked when made: ValueError says which field is wrong and what was expected.

    `replicas` classifiers; or, with `max_replicas`, from `min_replicas` to so many, as it takes to leave about
    `target_ongoing_requests` requests in each: about a batch, for a classifier that always has one at hand loses no
    time. Each gets `cpus` cores and `gpus` GPUs (a share of one will do), and `threads` threads for decoding and, on a
    CPU, for encoding (None: its cores, rounded up).

    `ingresses` processes with `ingress_cpus` cores take the HTTP requests, check them and pass the images on.

    A replica is asked every `health_period_s` seconds whether its engine works, and replaced where it does not or is
    dead.
    """

    replicas: int = 1
    min_replicas: int = 1
    max_replicas: int | None = None
    target_ongoing_requests: float = 32.0
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int | None = None
    ingresses: int = 1
    ingress_cpus: float = 0.5
    health_period_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("replicas", "min_replicas", "ingresses", "max_replicas", "threads"):
            value = getattr(self, name)
            if value is None and name in ("max_replicas", "threads"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        for name in ("target_ongoing_requests", "health_period_s", "cpus", "gpus", "ingress_cpus"):
            value = getattr(self, name)
            least = 0 if name.endswith("pus") else 1e-3
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(f"expected {name} to be a number of at least {least:g}, got {value!r}")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"expected max_replicas of at least min_replicas, got {self.max_replicas} and {self.min_replicas}"
            )

    @property
    def threads_each(self) -> int:
        return math.ceil(self.cpus) or 1 if self.threads is None else self.threads

    def replica_options(self) -> dict[str, Any]:
        """What Ray Serve is told of the number of replicas."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
            }
        }
