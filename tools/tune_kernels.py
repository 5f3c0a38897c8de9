"""Measure the Triton kernels' launch configurations on this GPU; the best go into kernels/launch_configs.json.

    python tools/tune_kernels.py --path aligned --precision fp16

Each candidate is verified against the float64 reference before it is timed. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import typer

from iosr_fast.benchmarks.devices import Device
from iosr_fast.kernels import launch
from iosr_fast.kernels.launch import Config
from iosr_fast.utils import command
from iosr_fast.utils.require import require

DEVICE, REPEATS = "cuda", 50
WIDTH = 512
BATCHES = {"few": (1, 32), "many": (256, 1024)}
COUNTS = {
    "affine": [[16] * 1000],
    "aligned": [[16] * 1000, [16] * 100],
    "ragged": [[1, 2, 60] * 250, [33, 7, 0, 24] * 100],
    "split": [[4000] * 4, [20000]],
    "dense": [[16] * 250],
}
# Roundings of half-precision queries stay well below this here; a wrong kernel is far above.
RELATIVE_TOLERANCE = {"fp32": 3e-5, "fp16": 1e-3, "bf16": 5e-3, "int8": 1e-3}


def candidates(path: str, precision: str, load: str) -> Iterator[Config]:
    """The grid of one path: tile shapes, warps and stages within reason; the compiler refuses what doesn't fit."""
    rows, columns = ((16, 32), (32, 64, 128)) if load == "few" else ((64, 128), (64, 128, 256))
    channels = (32,) if path == "affine" or precision == "fp32" else (64, 128)
    # The swap is for tiles of few queries, and for int8 keys: Hopper reads operands from registers on the longer side
    # alone, and int8 keys are converted there.
    swaps = (False, True) if load == "few" or precision == "int8" else (False,)
    for block_b, block_n, block_d, warps, stages, swap in itertools.product(
        rows, columns, channels, (4, 8), (3, 4), swaps
    ):
        accumulators = block_b * block_n // (32 * warps)
        if not 4 <= accumulators <= 128:
            continue  # idle warps, or more accumulators than registers
        for block_v in (64, 128) if path == "dense" else (64,):
            yield Config(block_b, block_n, block_d, warps, stages, swap, block_v=block_v)


def unit_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.standard_normal((n, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def case(path: str, precision: str, counts: list[int], batch: int) -> tuple[Callable[[Config], Any], np.ndarray]:
    """A call that runs one configuration on one shape, and the truth of its result."""
    import torch

    from iosr_fast.encoders.encoder import Embeddings
    from iosr_fast.kernels.cache_score import affine_terms, score_triton
    from iosr_fast.kernels.dense_values import dense_values
    from iosr_fast.scoring.device_plan import device_plan
    from iosr_fast.scoring.plan import ScoringPlan
    from iosr_fast.scoring.reference import score_reference

    rng = np.random.default_rng(0)
    n_keys, n_classes = sum(counts), len(counts)
    embeddings = Embeddings(unit_rows(rng, batch))
    query = torch.tensor(embeddings.plain, device=DEVICE)
    if path == "affine":
        terms = ScoringPlan(n_classes, text=unit_rows(rng, n_classes), linear=unit_rows(rng, n_classes))
        on_device = device_plan(terms, DEVICE)
        return lambda config: affine_terms(on_device, query, None, config), score_reference(terms, embeddings)
    plan = ScoringPlan(
        n_classes,
        keys=unit_rows(rng, n_keys),
        class_offsets=np.concatenate([[0], np.cumsum(counts)]),
        weights=rng.uniform(0.5, 2.0, n_keys),
        beta=5.5,
    )
    plan = plan.with_key_precision(precision)  # type: ignore[arg-type]
    on_device = device_plan(plan, DEVICE)
    if path != "dense":
        return (
            lambda config: score_triton(on_device, query, None, path=path, config=config)[0],
            score_reference(plan, embeddings),
        )
    values = torch.tensor(rng.random((n_keys, 256)), device=DEVICE, dtype=torch.float16)
    cosine = embeddings.plain.astype(np.float64) @ plan.dequantize().T.astype(np.float64)
    truth = np.exp(-plan.beta * (1.0 - cosine)) @ values.cpu().double().numpy()
    keys, scales = on_device.keys, on_device.key_scales
    assert keys is not None

    def run(config: Config) -> Any:
        return dense_values(query, keys, values, beta=plan.beta, key_scales=scales, config=config)

    return run, truth


def measure(run: Callable[[Config], Any], truth: np.ndarray, config: Config, tolerance: float) -> float | str:
    """Median milliseconds of one configuration, or why it is excluded."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        got = run(config).cpu().numpy()
    except (OutOfResources, PTXASError) as error:
        return f"does not fit: {error}".splitlines()[0]
    off = np.abs(got - truth).max() / np.abs(truth).max()
    if not off <= tolerance:  # NaN is wrong too
        return f"wrong: relative error {off:.2e}, at most {tolerance:.0e} expected"
    device = Device(DEVICE)
    call, _ = device.record(lambda: run(config))
    return float(np.median(device.measure({"": call}, REPEATS)[""]))


def fastest(path: str, precision: str, load: str, verbose: bool) -> tuple[float, Config] | None:
    """(geometric mean of milliseconds over the shapes, configuration), or None where no candidate is left."""
    shapes = [case(path, precision, counts, batch) for counts in COUNTS[path] for batch in BATCHES[load]]
    best: tuple[float, Config] | None = None
    for config in candidates(path, precision, load):
        times: list[float] = []
        for run, truth in shapes:
            outcome = measure(run, truth, config, RELATIVE_TOLERANCE[precision])
            if isinstance(outcome, str):
                if verbose or outcome.startswith("wrong"):
                    print(f"  {config}: {outcome}")
                break
            times.append(outcome)
        if len(times) < len(shapes):
            continue
        mean = float(np.exp(np.mean(np.log(times))))
        if verbose:
            print(f"  {config}: {mean:.4f} ms")
        if best is None or mean < best[0]:
            best = mean, config
    return best


def main(
    path: list[str] = typer.Option(list(launch.PATHS), help="Path to tune; repeat for several."),
    precision: list[str] = typer.Option(list(launch.PRECISIONS), help="Key precision; repeat for several."),
    load: list[str] = typer.Option(["few", "many"], help="few or many queries; repeat for both."),
    verbose: bool = typer.Option(False, help="Print every candidate, not the best alone."),
) -> None:
    """Sweep the candidates of each path, precision and load, and write the fastest for this GPU."""
    torch = require("torch", "gpu")
    require("triton", "gpu")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning needs an NVIDIA GPU, and PyTorch sees none here; nothing was changed")
    for option, values, known in (
        ("path", path, launch.PATHS),
        ("precision", precision, launch.PRECISIONS),
        ("load", load, tuple(BATCHES)),
    ):
        if not set(values) <= set(known):
            raise typer.BadParameter(f"expected {option} out of {', '.join(known)}, got {', '.join(values)}")
    gpu = torch.cuda.get_device_name()
    for one_path, one_precision, one_load in itertools.product(path, precision, load):
        if one_path == "affine" and one_precision != "fp32":
            continue  # these terms are float32 whatever the keys are
        best = fastest(one_path, one_precision, one_load, verbose)
        if best is None:
            print(f"{gpu} {one_path} {one_precision} {one_load}: no candidate fits and is right; the entry is kept")
            continue
        print(f"{gpu} {one_path} {one_precision} {one_load}: {best[0]:.4f} ms (geometric mean) with {best[1]}")
        configs = launch.read_configs()
        entry = configs.setdefault(gpu, {}).setdefault(one_path, {}).setdefault(one_precision, {})
        entry[one_load] = asdict(best[1])
        launch.write_configs(configs)


if __name__ == "__main__":
    command.run(main)
