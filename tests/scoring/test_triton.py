"""The Triton kernels: parity under the interpreter and on a GPU, layouts, launch configurations, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iosr_fast.kernels import launch, layout
from tests import ROOT
from tests.conftest import EXTENDED, random_embeddings, random_plan
from tests.scoring.test_score import LAYOUTS

needs_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "torch")),
    reason="triton or torch is not installed: pip install 'iosr_fast[gpu]'",
)


def cuda_or_skip() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    pytest.importorskip("triton")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("file", "least"), [("triton_parity", 150), ("triton_dense", 35), ("triton_bounds", 40)])
def test_parity_under_the_interpreter(file: str, least: int) -> None:
    # In a process of its own: triton_parity.py says why. It sees no GPU, as the interpreter needs none.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", f"tests/scoring/{file}.py"]
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    # Neither a skip nor an empty collection may pass for parity.
    assert passed is not None and int(passed[1]) > least, done.stdout[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", launch.PRECISIONS)
@pytest.mark.parametrize("path", ["few", "aligned", "ragged", "aligned-tma", "ragged-tma"])
def test_parity_on_the_gpu(path: str, precision: str, rng: np.random.Generator) -> None:
    cuda_or_skip()
    import torch

    from tests.scoring.triton_parity import assert_close_to_truth

    tma = path.endswith("-tma")
    if tma and not (9, 0) <= torch.cuda.get_device_capability() < (12, 0):
        pytest.skip("tensor descriptors are used from compute capability 9.0 to 11.0")
    cuts = np.diff([0, *np.sort(rng.integers(0, 5001, 96)), 5000]).tolist()
    cases = [(1, [16] * 100, 512), (300, [16] * 100, 512), (70, [1] * 999, 768)]
    if not path.startswith("aligned"):
        cases += [(257, cuts, 512), (70, [3000, 1, 0, 5], 112 if tma else 123), (5, [9], 16 if tma else 17)]
    for batch, counts, width in cases:
        plan = random_plan(rng, counts, width).with_key_precision(precision)
        first = assert_close_to_truth(plan, random_embeddings(rng, batch, width), path, device="cuda")
        assert first.is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("precision", launch.PRECISIONS)
def test_dense_values_on_the_gpu(precision: str, rng: np.random.Generator) -> None:
    cuda_or_skip()
    import torch

    from tests.scoring.triton_dense import assert_dense_close

    for shape in ((1, 4000, 512, 100), (300, 1000, 512, 1000), (33, 123, 17, 7)):
        for values_dtype in (torch.float16, torch.float32):
            assert_dense_close(rng, shape, precision, values_dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", launch.PRECISIONS)
@pytest.mark.parametrize("name", EXTENDED)
def test_extended_plans_on_the_gpu(name: str, precision: str, rng: np.random.Generator) -> None:
    cuda_or_skip()
    import torch

    from tests.scoring.triton_parity import assert_close_to_truth

    parts = EXTENDED[name]
    no_path = "dense" if parts.get("dense") else None if "cache" in parts.get("terms", ("cache",)) else "no-keys"
    for batch, counts, width, path in (
        (1, [16] * 100, 512, "few"),
        (300, [16] * 100, 512, "aligned"),
        (300, [16, 3] * 50, 512, "ragged"),
        (33, [8] * 9, 123, "aligned"),
        (0, [9], 17, "few"),
    ):
        plan = random_plan(rng, counts, width, **parts, precision=precision)
        embeddings = random_embeddings(rng, batch, width)
        tma = path == "aligned" and width == 512 and (9, 0) <= torch.cuda.get_device_capability() < (12, 0)
        expected = no_path or (f"{path}-tma" if tma else path)
        assert assert_close_to_truth(plan, embeddings, None, device="cuda", expected=expected).is_cuda


@pytest.mark.gpu
def test_equal_calls_give_equal_bits_on_the_gpu(rng: np.random.Generator) -> None:
    cuda_or_skip()
    import torch

    from iosr_fast.kernels.cache_score import score_triton
    from iosr_fast.scoring.device_plan import device_plan
    from tests.scoring.triton_parity import tensors

    plan = device_plan(random_plan(rng, [5000, 3, 0, 900], 512).with_key_precision("fp16"), "cuda")
    rows = tensors(random_embeddings(rng, 64, 512), "cuda")
    for path in ("few", "ragged"):
        first, second = (score_triton(plan, *rows, path=path)[0] for _ in range(2))
        assert torch.equal(first, second)


def counts_to_offsets(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


@pytest.mark.parametrize("counts", [*LAYOUTS, [16] * 50, [1000, 0, 1, 1, 300]], ids=lambda counts: f"{len(counts)}c")
@pytest.mark.parametrize(("block_n", "block_c"), [(16, 16), (64, 16), (16, 32), (256, 64)])
def test_items_hold_every_key_and_every_class_once(counts: list[int], block_n: int, block_c: int) -> None:
    offsets = counts_to_offsets(counts)
    work = layout.cut_items(offsets, block_n, block_c)
    keys = [key for first, end, *_ in work.table.tolist() for key in range(first, end)]
    assert keys == list(range(sum(counts)))
    classes: list[int] = []
    for first, end, label, n_classes, slot in work.table.tolist():
        assert end - first <= block_n
        if slot < 0:
            assert (first, end) == (offsets[label], offsets[label + n_classes]) and n_classes <= block_c
            classes += range(label, label + n_classes)
        else:
            assert offsets[label] <= first < end <= offsets[label + 1] and n_classes == 1
            classes += [label] if first == offsets[label] else []
    assert classes == list(range(len(counts)))
    # A cut class's pieces are its own, in order, and fill the slots without a gap.
    slots = [row[4] for row in work.table.tolist() if row[4] >= 0]
    assert slots == list(range(work.n_slots))
    of_slot = {row[4]: row[2] for row in work.table.tolist()}
    assert [
        slot for label, first, end in work.cut.tolist() for slot in range(first, end) if of_slot[slot] == label
    ] == slots
    assert sorted(work.cut[:, 0]) == [c for c, count in enumerate(counts) if count > block_n]


def test_classes_of_equally_many_keys() -> None:
    def shots(counts: list[int], block_n: int = 64) -> int:
        return layout.shots_of(counts_to_offsets(counts), block_n)

    assert shots([16] * 1000) == 16 and shots([1, 1, 1]) == 1 and shots([64] * 2) == 64
    assert shots([16, 15]) == shots([3, 3]) == shots([128] * 2) == shots([0, 0]) == 0


def test_classes_of_an_item_are_those_of_a_tile_on_average() -> None:
    assert layout.block_classes(16_000, 1000, 256) == layout.block_classes(10**6, 1000, 256) == 16
    assert layout.block_classes(4000, 1000, 256) == 64 and layout.block_classes(3000, 1000, 256) == 128
    assert layout.block_classes(1, 1000, 256) == 256


def test_every_launch_configuration_is_there_and_right() -> None:
    for path in launch.PATHS:
        for precision in ("fp32",) if path == "affine" else launch.PRECISIONS:
            for load in launch.loads(path):
                config = launch.config_for("a GPU without an entry", path, precision, load)  # type: ignore[arg-type]
                assert config == launch.config_for("default", path, precision, load)  # type: ignore[arg-type]
    for precision in launch.PRECISIONS:
        config = launch.config_for("default", "dense", precision, "many")
        halved = launch.dense_config("default", precision, "many", float_values=True)
        assert halved.block_n == config.block_n // (2 if precision in ("fp16", "int8") else 1)
        assert launch.dense_config("default", precision, "many", float_values=False) == config
    for name, paths in launch.read_configs().items():
        for path, precisions in paths.items():
            for precision, loads in precisions.items():
                for load in loads:
                    launch.config_for(name, path, precision, load)
    assert launch.load_of(1) == launch.load_of(launch.FEW_QUERIES) == "few"
    assert launch.load_of(launch.FEW_QUERIES + 1) == "many"


def test_a_gpu_of_its_own_entry_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CONFIGS_FILE", tmp_path / "launch_configs.json")
    entry = {"block_b": 32, "block_n": 64, "block_d": 16, "num_warps": 4, "num_stages": 2}
    default = {"aligned": {"fp16": {"few": entry, "many": entry}}}

    def write(block_b: int) -> None:
        configs = {"default": default, "GPU X": {"aligned": {"fp16": {"few": entry | {"block_b": block_b}}}}}
        launch.CONFIGS_FILE.write_text(json.dumps(configs), encoding="utf-8")
        launch.read_configs.cache_clear()
        launch.config_for.cache_clear()

    try:
        write(16)
        assert launch.config_for("GPU X", "aligned", "fp16", "few").block_b == 16
        assert launch.config_for("GPU X", "aligned", "fp16", "many").block_b == 32
        with pytest.raises(ValueError, match=r"expected a path of affine, .* got 'diagonal' and 'fp16'"):
            launch.config_for("GPU X", "diagonal", "fp16", "few")
        write(24)
        with pytest.raises(ValueError, match=r"'GPU X'/aligned/fp16/few: expected block_b a power of two .* got 24"):
            launch.config_for("GPU X", "aligned", "fp16", "few")
    finally:
        launch.read_configs.cache_clear()
        launch.config_for.cache_clear()
