"""Fixed batch sizes and CUDA graphs: on the CPU all but the recording, which has a stand-in; on a GPU, all of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iosr_fast.encoders.runtimes.batched import BatchedEncoder, bucket_of, check_buckets, powers_of_two

pytestmark = pytest.mark.slow

SIZE, WIDTH = 4, 3


def manifest(max_batch: int, first_adapted_block: int | None = 1) -> dict[str, Any]:
    return {
        "model": "mean colour",
        "image_size": SIZE,
        "width": WIDTH,
        "fingerprint": "f" * 64,
        "max_batch": max_batch,
        "first_adapted_block": first_adapted_block,
    }


class MeanColour(BatchedEncoder):
    """An encoder that is quickly checked; the rows that fill a batch up are NaN."""

    def __init__(self, max_batch: int, buckets: tuple[int, ...] | None, adapted: bool = True) -> None:
        super().__init__(manifest(max_batch, 1 if adapted else None), "fake", buckets)
        self.ran: list[tuple[int, int]] = []
        self.prepared: list[int] = []

    def _run(self, pixels: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        assert pixels.flags.c_contiguous and len(pixels) <= size <= self.max_batch
        self.ran.append((len(pixels), size))
        means = np.full((size, WIDTH), np.nan, np.float32)
        means[: len(pixels)] = pixels.mean((1, 2))
        return (means, -means)[: len(self.outputs)]

    def _prepare(self, size: int) -> None:
        self.prepared.append(size)


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def test_buckets() -> None:
    assert powers_of_two(1) == (1,) and powers_of_two(8) == (1, 2, 4, 8) and powers_of_two(12) == (1, 2, 4, 8, 12)
    assert check_buckets([4, 1, 4], 6) == (1, 4, 6) and check_buckets([], 6) == (6,)
    assert [bucket_of(size, (1, 4, 6)) for size in range(1, 7)] == [1, 4, 4, 4, 6, 6]
    for wrong in ([0], [7, 2], [-1]):
        with pytest.raises(ValueError, match=rf"batch sizes of 1 to 6, .*got \[{wrong[0]}\]"):
            check_buckets(wrong, 6)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 6, 7, 14])
def test_batches_are_filled_up_to_a_bucket_and_cut_again(batch: int, adapted: bool) -> None:
    encoder, pixels = MeanColour(6, (1, 4), adapted), pictures(batch)
    found = encoder.encode(pixels)
    np.testing.assert_array_equal(found.plain, pixels.mean((1, 2)).astype(np.float32))
    assert (found.adapted is not None) == adapted
    if found.adapted is not None:
        np.testing.assert_array_equal(found.adapted, -found.plain)
    expected = {1: [(1, 1)], 2: [(2, 4)], 3: [(3, 4)], 6: [(6, 6)], 7: [(6, 6), (1, 1)], 14: [(6, 6), (6, 6), (2, 4)]}
    assert encoder.ran == expected[batch]


def test_without_buckets_nothing_is_filled_up() -> None:
    encoder = MeanColour(6, None)
    encoder.encode(pictures(9))
    assert encoder.ran == [(6, 6), (3, 3)] and encoder.buckets is None


def test_pixels_that_an_encoder_can_not_read_are_refused_before_any_work() -> None:
    torch = pytest.importorskip("torch")
    encoder = MeanColour(6, (1, 4))
    for wrong, got in (
        (torch.from_numpy(pictures(2)), "Tensor"),
        (pictures(2).tolist(), "list"),
        (pictures(2).astype(np.float32), "float32"),
    ):
        with pytest.raises(ValueError, match=rf"expected pixels as a uint8 array \(B, 4, 4, 3\) .*, got {got}; "):
            encoder.encode(wrong)
    for shape in ((4, 4, 3), (0, 4, 4, 3), (2, 4, 3, 4)):
        with pytest.raises(ValueError, match=rf"expected pixels of shape .*, got {re.escape(str(shape))}; "):
            encoder.encode(np.zeros(shape, np.uint8))
    assert encoder.ran == []


def test_warming_runs_each_size_once() -> None:
    encoder = MeanColour(6, (1, 4))
    encoder.warm()
    assert encoder.prepared == [1, 4, 6] and encoder.ran == [(1, 1), (4, 4), (6, 6)]
    encoder = MeanColour(6, (1, 4))
    encoder.warm([3, 2, 1])
    assert encoder.prepared == [1, 4] and encoder.ran == [(1, 1), (4, 4)]
    encoder = MeanColour(6, None)
    encoder.warm()
    encoder.warm([5, 2])
    assert encoder.ran == [(1, 1), (2, 2), (5, 5)]
    for wrong in ([7], [0, 1]):
        with pytest.raises(ValueError, match="batch sizes of 1 to 6"):
            encoder.warm(wrong)
    assert len(encoder.ran) == 3, "refused before any work"


class Replaying:
    """A Recorder without a GPU: a replay computes again, into the memory of the record, and spoils all other records,
    whose memory graphs may share."""

    def __init__(self, refuses: bool = False) -> None:
        self.runs, self.replays, self.turns = 0, 0, 0
        self.records: list[tuple[Any, ...]] = []
        self.refuses, self.inside = refuses, False

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.inside
        self.inside, self.turns = True, self.turns + 1
        try:
            yield
        finally:
            self.inside = False

    def record(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.refuses:
            raise RuntimeError("an operation waits for the device")
        run()
        static = run()
        self.runs += 2
        mine = static if isinstance(static, tuple) else (static,)
        self.records.append(mine)

        def replay() -> Any:
            assert self.inside
            self.replays += 1
            for record in self.records:
                for tensor in record:
                    tensor.fill_(float("nan"))
            again = run()
            for tensor, value in zip(mine, again if isinstance(again, tuple) else (again,), strict=True):
                tensor.copy_(value)
            return static

        return replay


@pytest.fixture(scope="module")
def torch_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    from iosr_fast.clip.adapter import random_adapter
    from iosr_fast.export.build import write_engine
    from tests.clip.small_clip import small_clip

    clip, folder = small_clip(), tmp_path_factory.mktemp("engine") / "engine"
    write_engine(clip, random_adapter(clip, 1), folder, "torch", max_batch=6)
    return folder


def encode_both(encoder: Any, pixels: Any) -> np.ndarray:
    found = encoder.encode(pixels)
    return np.stack([found.plain, found.adapted])


@pytest.mark.parametrize("refuses", [False, True])
def test_the_torch_encoder_replays_what_it_recorded(
    torch_engine: Path, refuses: bool, caplog: pytest.LogCaptureFixture
) -> None:

    from iosr_fast.encoders.runtimes.torch import TorchEncoder
    from iosr_fast.utils.manifest import read_manifest
    from tests.clip.small_clip import random_pixels

    facts, pixels, recorder = read_manifest(torch_engine, "engine"), random_pixels(9, 32), Replaying(refuses)
    eager = TorchEncoder(torch_engine, facts, device="cpu")
    assert eager.buckets is None, "a CPU runs arrays of any size as they come"
    graphed = TorchEncoder(torch_engine, facts, device="cpu")
    graphed.buckets = powers_of_two(6)
    graphed._use_buckets(recorder)  # type: ignore[arg-type]
    np.testing.assert_allclose(encode_both(graphed, pixels[:5]), encode_both(eager, pixels[:5]), atol=1e-6)
    assert recorder.replays == 0, "without warming up nothing is recorded"
    graphed.warm()
    graphed.warm()
    assert recorder.runs == (0 if refuses else 2 * 4) and recorder.replays == (0 if refuses else 2 * 4)
    for batch in (1, 2, 3, 6, 9):
        np.testing.assert_allclose(encode_both(graphed, pixels[:batch]), encode_both(eager, pixels[:batch]), atol=1e-6)
        there = graphed.encode_on_device(pixels[:batch])
        graphed.encode(pixels[::-1])  # whose replays overwrite what the graphs return
        assert "Tensor" in type(there.plain).__name__ and there.plain.shape == (batch, eager.width)
        np.testing.assert_array_equal(there.to_numpy().plain, graphed.encode(pixels[:batch]).plain)
    assert (recorder.replays > 8) == (not refuses)
    assert ("without a CUDA graph, which can't be recorded: an operation waits" in caplog.text) == refuses


def test_the_torch_encoder_records_what_it_compiled(torch_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation for all batch sizes above 1, without a break; the backend stands in for PyTorch's compiler."""
    import torch

    from iosr_fast.encoders.runtimes.torch import COMPILE, TorchEncoder
    from iosr_fast.utils.manifest import read_manifest
    from tests.clip.small_clip import random_pixels

    facts, pixels, recorder, graphs = read_manifest(torch_engine, "engine"), random_pixels(6, 32), Replaying(), []
    compile_with = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_with(module, backend=backend, **options))
    monkeypatch.setenv(COMPILE, "1")
    encoder = TorchEncoder(torch_engine, facts, device="cpu")
    expected = encode_both(encoder, pixels)
    assert not graphs, "a CPU compiles nothing"
    encoder.buckets = powers_of_two(6)
    encoder._use_buckets(recorder)  # type: ignore[arg-type]
    encoder.warm([2, 3, 6])
    assert len(graphs) == 1 and recorder.replays == 3
    np.testing.assert_allclose(encode_both(encoder, pixels), expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_torch_graphs_on_a_gpu(torch_engine: Path, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU")
    from iosr_fast.encoders.runtimes import open_engine
    from tests.clip.small_clip import random_pixels

    pixels = random_pixels(9, 32)
    eager = open_engine(torch_engine, "torch", buckets=(1, 3))
    monkeypatch.setenv("IOSR_FAST_TORCH_COMPILE", compiled)
    graphed = open_engine(torch_engine, "torch", buckets=(1, 3))
    graphed.warm()  # type: ignore[attr-defined]
    assert sorted(graphed._replay) == [1, 3, 6]  # type: ignore[attr-defined]
    for batch in (1, 2, 3, 5, 6, 9, 1):
        expected = encode_both(eager, pixels[:batch])
        np.testing.assert_allclose(encode_both(graphed, pixels[:batch]), expected, atol=1e-5)
        there = graphed.encode_on_device(pixels[:batch])
        graphed.encode(pixels[::-1])
        assert there.plain.is_cuda
        np.testing.assert_allclose(there.to_numpy().plain, expected[0], atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_graphs_on_a_gpu(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip")

    from iosr_fast.clip.adapter import random_adapter
    from iosr_fast.encoders.runtimes import engine, open_engine
    from iosr_fast.export.build import write_engine
    from tests.clip.small_clip import random_pixels, small_clip

    if (unavailable_reason := engine.unavailable_reason(runtime)) is not None:
        pytest.skip(unavailable_reason)
    monkeypatch.setenv("IOSR_FAST_CACHE", str(tmp_path / "cache"))
    clip, pixels = small_clip(), random_pixels(9, 32)
    write_engine(clip, random_adapter(clip, 1), tmp_path / "engine", runtime, "fp16", 6)
    eager, graphed = (open_engine(tmp_path / "engine", runtime, buckets=(1, 3)) for _ in range(2))
    graphed.warm()  # type: ignore[attr-defined]
    assert sorted(graphed._replay) == [1, 3, 6]  # type: ignore[attr-defined]
    for batch in (1, 2, 3, 5, 6, 9, 1):
        expected = encode_both(eager, pixels[:batch])
        np.testing.assert_allclose(encode_both(graphed, pixels[:batch]), expected, atol=2e-3)
