"""Measure the Triton kernels' launch configurations on this GPU; the best go into kernels/launch_configs.json.

    python tools/tune_kernels.py --case aligned-tma/fp16/many

Each candidate is verified against the float64 reference before it is timed. Candidates are the configuration that is in
use and those of tools/tuning_candidates.json, which tools/rank_kernels.py writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import typer

from iosr_fast.benchmarks.devices import Device
from iosr_fast.benchmarks.gpu_parts import TUNED
from iosr_fast.utils import command
from iosr_fast.utils.machine import usable_threads
from iosr_fast.utils.require import require
from tools.source_tree import use_source_tree

use_source_tree()

from iosr_fast.kernels import launch  # noqa: E402
from iosr_fast.kernels.launch import Config  # noqa: E402
from tools.rank_kernels import BATCHES, CANDIDATES_FILE, MOST  # noqa: E402

Case = tuple[str, str, str]  # path, precision, load
CASES = ["/".join(one) for one in TUNED]
_UNIFORM, _RAGGED = [[16] * 1000, [16] * 100], [[1, 2, 60] * 250, [33, 7, 0, 24] * 100, [4000] * 4]
COUNTS = {
    "affine": [[16] * 1000],
    "dense": [[16] * 250],
    **dict.fromkeys(("aligned", "aligned-tma"), _UNIFORM),
    **dict.fromkeys(("ragged", "ragged-tma"), _RAGGED),
    "few": _UNIFORM + _RAGGED,
}


@dataclass(frozen=True)
class Scale:
    """What is measured: on a GPU the shapes above; a rehearsal has tiny ones, on the CPU, in Triton's interpreter."""

    device: Device
    width: int = 512
    repeats: int = 50
    batches: dict[str, tuple[int, ...]] = field(default_factory=lambda: BATCHES)
    counts: dict[str, list[list[int]]] = field(default_factory=lambda: COUNTS)

    @property
    def gpu(self) -> str:
        """The name of its entry in launch_configs.json."""
        return self.device.description if self.device.name == "cuda" else "default"

    @classmethod
    def of(cls, device: str) -> Scale:
        if device != "rehearsal":
            return cls(Device(device))
        return cls(Device(device), 32, 1, {load: (3,) for load in BATCHES}, {path: [[4, 4, 4]] for path in COUNTS})


# Roundings of half-precision queries stay well below this here; a wrong kernel is far above.
RELATIVE_TOLERANCE = {"fp32": 3e-5, "fp16": 1e-3, "bf16": 5e-3, "int8": 1e-3}


def ranked(path: str, precision: str, load: str, gpu: str) -> list[Config]:
    """The configuration in use on `gpu`, and the best MOST of CANDIDATES_FILE."""
    ranks = json.loads(CANDIDATES_FILE.read_text(encoding="utf-8")) if CANDIDATES_FILE.is_file() else {}
    entries = ranks.get(path, {}).get(precision, {}).get(load, [])
    in_use = launch.config_for(gpu, path, precision, load)  # type: ignore[arg-type]
    return [in_use, *(config for config in map(lambda entry: Config(**entry), entries[:MOST]) if config != in_use)]


def unit_rows(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def case(
    path: str, precision: str, counts: list[int], batch: int, scale: Scale
) -> tuple[Callable[[Config], Any], Callable[[], np.ndarray]]:
    """A call that runs one configuration on one shape, and one that computes the truth of its result."""
    import torch

    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.kernels.affine import affine_terms
    from iosr_fast.kernels.cache_score import score_triton
    from iosr_fast.kernels.dense_values import dense_values
    from iosr_fast.scoring.device_plan import device_plan
    from iosr_fast.scoring.plan import ScoringPlan
    from iosr_fast.scoring.reference import score_reference

    rng, width, device = np.random.default_rng(0), scale.width, scale.device.torch
    n_keys, n_classes = sum(counts), len(counts)
    embeddings = Embeddings(unit_rows(rng, batch, width))
    query = torch.tensor(embeddings.plain, device=device)
    if path == "affine":
        terms = ScoringPlan(n_classes, text=unit_rows(rng, n_classes, width), linear=unit_rows(rng, n_classes, width))
        on_device = device_plan(terms, device)
        return lambda config: affine_terms(on_device, query, None, config), lambda: score_reference(terms, embeddings)
    plan = ScoringPlan(
        n_classes,
        keys=unit_rows(rng, n_keys, width),
        class_offsets=np.concatenate([[0], np.cumsum(counts)]),
        weights=rng.uniform(0.5, 2.0, n_keys),
        beta=5.5,
    )
    plan = plan.with_key_precision(precision)  # type: ignore[arg-type]
    on_device = device_plan(plan, device)
    if path != "dense":
        way = {"path": path.removesuffix("-tma"), "tma": path.endswith("-tma")}
        return (
            lambda config: score_triton(on_device, query, None, **way, config=config)[0],  # type: ignore[arg-type]
            lambda: score_reference(plan, embeddings),
        )
    values = torch.tensor(rng.random((n_keys, 256)), device=device, dtype=torch.float16)
    keys, scales = on_device.keys, on_device.key_scales
    assert keys is not None

    def truth() -> np.ndarray:
        cosine = embeddings.plain.astype(np.float64) @ plan.dequantize().T.astype(np.float64)
        return np.exp(-plan.beta * (1.0 - cosine)) @ values.cpu().double().numpy()

    def run(config: Config) -> Any:
        return dense_values(query, keys, values, beta=plan.beta, key_scales=scales, config=config)

    return run, truth


def measure(
    run: Callable[[Config], Any], truth: np.ndarray, config: Config, tolerance: float, scale: Scale
) -> float | str:
    """Median milliseconds of one configuration, or why it is excluded."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        got = run(config).cpu().numpy()
    except (OutOfResources, PTXASError) as error:
        return f"does not fit: {error}".splitlines()[0]
    except Exception as error:  # of the compiler or the launch; the other configurations are still worth measuring
        return f"wrong: {type(error).__name__}: {error}".splitlines()[0]
    off = np.abs(got - truth).max() / np.abs(truth).max()
    if not off <= tolerance:  # NaN is wrong too
        return f"wrong: relative error {off:.2e}, at most {tolerance:.0e} expected"
    call, _ = scale.device.record(lambda: run(config))
    return float(np.median(scale.device.measure({"": call}, scale.repeats)[""]))


def measured(path: str, precision: str, load: str, scale: Scale) -> Iterator[dict[str, Any]]:
    """A line for each of ranked(): the configuration and its geometric mean of milliseconds over the shapes, or why it
    is excluded."""
    batches, tolerance = scale.batches[load], RELATIVE_TOLERANCE[precision]
    cases = [case(path, precision, counts, batch, scale) for counts in scale.counts[path] for batch in batches]
    shapes = [(run, truth()) for run, truth in cases]
    for config in ranked(path, precision, load, scale.gpu):
        outcomes: list[float | str] = []
        for run, truth in shapes:
            outcomes.append(measure(run, truth, config, tolerance, scale))
            if isinstance(outcomes[-1], str):
                break
        line = {"path": path, "precision": precision, "load": load, "config": asdict(config)}
        if isinstance(outcomes[-1], str):
            print(f"{'WRONG' if outcomes[-1].startswith('wrong') else '  left out'}: {config}: {outcomes[-1]}")
            yield {**line, "excluded": outcomes[-1]}
        else:
            yield {**line, "runtime_ms": float(np.exp(np.mean(np.log(np.array(outcomes, float)))))}


def tune(path: str, precision: str, load: str, scale: Scale) -> Iterator[dict[str, Any]]:
    """Measure one case; on a GPU the fastest configuration so far is the GPU's entry of launch_configs.json."""
    best: dict[str, Any] | None = None
    for line in measured(path, precision, load, scale):
        if "runtime_ms" in line and (best is None or line["runtime_ms"] < best["runtime_ms"]):
            best = line
            if scale.device.name == "cuda":  # at once, as time may run out
                configs = launch.read_configs()
                configs.setdefault(scale.gpu, {}).setdefault(path, {}).setdefault(precision, {})[load] = line["config"]
                launch.write_configs(configs)
        yield line
    name = f"{scale.gpu} {path} {precision} {load}"
    if best is None:
        print(f"{name}: no candidate fits and is right; the entry is kept")
    else:
        print(f"{name}: {best['runtime_ms']:.4f} ms (geometric mean) with {best['config']}")


def compile_all(cases: Sequence[Case], device: str) -> None:
    """Run every configuration of the cases once, in a process a core, so that measuring processes find the kernels in
    Triton's cache. What fails here fails there too, and is reported there."""
    scale = Scale.of(device)
    jobs = [(one, config) for one in cases for config in ranked(*one, scale.gpu)]
    with ProcessPoolExecutor(usable_threads(), get_context("spawn")) as pool:
        done = as_completed([pool.submit(_compile, one, config, device) for one, config in jobs])
        failed = sum(future.exception() is not None for future in done)
    print(f"compiled {len(jobs) - failed} of {len(jobs)} configurations")


def _compile(one: Case, config: Config, device: str) -> None:
    (path, precision, load), scale = one, Scale.of(device)
    for counts in scale.counts[path]:
        run, _ = case(path, precision, counts, scale.batches[load][-1], scale)
        run(config)
    scale.device.synchronize()


def parse(text: str) -> Case:
    """The case "path/precision/load"."""
    path, _, rest = text.partition("/")
    precision, _, load = rest.partition("/")
    known = path in launch.PATHS and precision in launch.PRECISIONS and load in launch.loads(path)
    if not known or (path == "affine" and precision != "fp32"):  # its terms are float32 whatever the keys are
        raise typer.BadParameter(f"expected a case like {CASES[0]} that has a configuration, got {text!r}")
    return path, precision, load


def main(
    case: list[str] = typer.Option(CASES, help="Path/precision/load; repeat for several."),
    device: str = typer.Option(
        "cuda", help="cuda, or rehearsal: tiny shapes in Triton's interpreter; nothing is kept."
    ),
    compile_only: bool = typer.Option(False, "--compile", help="Compile on every core, and measure nothing."),
    json_file: Path | None = typer.Option(None, "--json", help="Write every measured configuration here."),
) -> None:
    """Measure the candidates of each case, and write the fastest for this GPU."""
    torch = require("torch", "gpu")
    require("triton", "gpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("tuning needs an NVIDIA GPU, and PyTorch sees none here; nothing was changed")
    cases, lines = [parse(text) for text in case], []
    if compile_only:
        return compile_all(cases, device)
    scale = Scale.of(device)
    for one in cases:
        for line in tune(*one, scale):
            lines.append(line)
            if json_file is not None:
                json_file.write_text(json.dumps({"tables": {"configurations": lines}}), encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
