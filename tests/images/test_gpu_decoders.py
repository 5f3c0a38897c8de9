"""Which decoder is chosen and why not, and the GPU decoders' batches: their calls against stand-ins.
None of it needs a GPU; none of it shows that a GPU does it."""

from __future__ import annotations

import io
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, ImageOps

torch = pytest.importorskip("torch")

from benchmarks.photographs import photograph  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402
from iosr_fast.encoders.runtimes import plans  # noqa: E402
from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images import decoders, gpu_decoders  # noqa: E402
from iosr_fast.images.decode import DecodedBatch  # noqa: E402
from iosr_fast.images.decoders import choose_decoder  # noqa: E402
from iosr_fast.images.geometry import Geometry  # noqa: E402
from iosr_fast.images.gpu_decoders import NvImageCodecDecoder, TorchCodecDecoder, shrink  # noqa: E402
from iosr_fast.images.preprocess import open_image, resize_and_crop  # noqa: E402
from iosr_fast.utils import machine  # noqa: E402
from tests.images.geometries import GEOMETRIES  # noqa: E402
from tests.pictures import encode  # noqa: E402

GPU = plans.Gpu("a stand-in", (9, 0))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    images: np.ndarray = load_pictures("held-out").images
    return images


@pytest.fixture
def batch(pictures: np.ndarray, tmp_path: Path) -> list[Any]:
    """JPEGs as paths and bytes; a PNG, a thin and a cut JPEG, no image, no file, an array."""
    image = photograph(pictures[0], 300, 200)
    (tmp_path / "a.jpg").write_bytes(encode(photograph(pictures[1], 200, 260), "JPEG", quality=90))
    data = encode(image, "JPEG", quality=90)
    sources: list[Any] = [tmp_path / "a.jpg", data, encode(image), encode(image.resize((1500, 20)), "JPEG")]
    return [*sources, data[:3000], b"no picture", str(tmp_path / "nowhere.jpg"), np.asarray(image)]


def assert_decoded(decoded: DecodedBatch, sources: list[Any]) -> None:
    assert [None if error is None else error.position for error in decoded.errors] == [*[None] * 4, 34, 35, 36, None]
    readable = [source for source, error in zip(sources, decoded.errors, strict=True) if error is None]
    assert isinstance(decoded.pixels, torch.Tensor) and decoded.pixels.dtype == torch.uint8
    for pixels, source in zip(decoded.pixels, readable, strict=True):
        expected = resize_and_crop(open_image(source), Geometry(64))
        assert pixels.shape == (64, 64, 3)
        assert np.abs(pixels.numpy().astype(int) - expected).mean() <= 1


@pytest.fixture
def no_copy_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A tensor that is read back, or waited for, is an error. CPU tensors stand for the GPU's."""

    def copied(*_: Any, **__: Any) -> None:
        raise AssertionError("pixels were copied to the CPU")

    with monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "__array__", "tolist", "item"):
            patch.setattr(torch.Tensor, name, copied)
        yield patch


def test_torchcodec_decodes_what_it_can_and_the_cpu_the_rest(batch: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    right = gpu_decoders.try_decode

    def noted(source: Any, geometry: Geometry, position: int, *rest: Any) -> Any:
        left.append(position - 30)
        return right(source, geometry, position, *rest)

    monkeypatch.setattr(gpu_decoders, "try_decode", noted)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", FakeTorchCodec)
    assert_decoded(TorchCodecDecoder("cpu").decode(batch, Geometry(64), 30), batch)
    assert left == [2, 3, 4, 5, 6, 7]
    nothing = TorchCodecDecoder("cpu").decode(batch[5:7], Geometry(64))
    assert nothing.pixels is None and nothing.to_numpy() is nothing and None not in nothing.errors


@pytest.mark.parametrize("kind", ["torchcodec", "nvimagecodec"])
def test_no_pixel_goes_to_the_cpu_and_those_made_there_come_in_one_upload(
    batch: list[Any], kind: str, monkeypatch: pytest.MonkeyPatch, no_copy_to_the_cpu: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", FakeTorchCodec)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    uploads: list[tuple[int, ...]] = []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: (uploads.append(array.shape), from_numpy(array))[1])
    decoder: Any = (TorchCodecDecoder if kind == "torchcodec" else NvImageCodecDecoder)("cpu")
    decoded = decoder.decode(batch, Geometry(64), 30)
    no_copy_to_the_cpu.undo()
    pixels = [shape for shape in uploads if shape[-3:] == (64, 64, 3)]  # the fakes take decoded JPEGs from NumPy
    assert pixels == [(3, 64, 64, 3)], "the PNG, the thin JPEG and the array"
    assert_decoded(decoded, batch)


def test_arrays_and_tensors_are_stacked_in_order() -> None:
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(5)]
    for kinds in product((False, True), repeat=5):
        mixed = [torch.tensor(image) if there else image for image, there in zip(images, kinds, strict=True)]
        stacked = gpu_decoders.stack(mixed, "cpu")
        assert stacked.shape == (5, 2, 2, 3) and stacked.dtype == torch.uint8
        assert stacked[:, 1, 1, 2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "geometry",
    GEOMETRIES,
    ids=str,
)
@pytest.mark.parametrize("shape", [(300, 200), (201, 333), (64, 64), (64, 91), (40, 50), (700, 525)])
def test_shrink_is_the_reference(pictures: np.ndarray, shape: tuple[int, int], geometry: Geometry) -> None:
    image = photograph(pictures[2], *shape, deviation=40)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    shrunk = shrink(tensor, geometry).permute(1, 2, 0).numpy()
    error = np.abs(shrunk.astype(int) - resize_and_crop(image, geometry))
    assert error.mean() <= 0.5 and error.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [TorchCodecDecoder, "nvimagecodec"])
def test_a_rotated_jpeg_is_turned_upright_on_a_gpu_too(
    pictures: np.ndarray, kind: Any, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", FakeTorchCodec)
    left: list[Any] = []
    right = gpu_decoders.try_decode
    monkeypatch.setattr(gpu_decoders, "try_decode", lambda *rest: left.append(rest[0]) or right(*rest))
    made = NvImageCodecDecoder if kind == "nvimagecodec" else kind
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(pictures[4], 201, 150), "JPEG", quality=95, exif=exif)
    for chosen in (True, False):
        (found,) = made("cpu", exif_orientation=chosen).decode([data], Geometry(64)).to_numpy().pixels
        expected = resize_and_crop(open_image(data, exif_orientation=chosen), Geometry(64))
        assert np.abs(found.astype(int) - expected).mean() <= 1
    stored = kind is TorchCodecDecoder and orientation != 1  # it gives upright images only
    assert left == [data] * stored, "the CPU decodes what the GPU can't"


class FakeTorchCodec:
    """A fake of torchcodec.decoders, which decodes with Pillow; like it, it turns images and fails as a batch."""

    @staticmethod
    def decode_jpeg(source: list[bytes], *, mode: str = "RGB", device: Any = "cpu") -> list[Any]:
        assert isinstance(source, list) and source and mode == "RGB"
        try:
            images = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB") for data in source]
        except OSError as error:
            raise RuntimeError("jpeg decoding failed") from error
        return [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device) for image in images]


class FakeCodec:
    """A fake of nvidia.nvimgcodec, which decodes with Pillow and, like it, gives None for what it can't decode.

    A decoder belongs to one thread. `streams` collects the CUDA streams on which decoding was asked for.
    """

    streams: ClassVar[list[int]] = []

    class DecodeParams:
        def __init__(self, *, apply_exif_orientation: bool) -> None:
            assert not apply_exif_orientation

    class Decoder:
        def __init__(self) -> None:
            self._thread: int | None = None

        def decode(self, data: list[bytes], params: Any, cuda_stream: int = 0) -> list[np.ndarray | None]:
            assert isinstance(params, FakeCodec.DecodeParams) and data
            self._thread = self._thread or threading.get_ident()
            assert self._thread == threading.get_ident(), "two threads share a decoder"
            FakeCodec.streams.append(cuda_stream)
            return [self._one(given) for given in data]

        @staticmethod
        def _one(given: bytes) -> np.ndarray | None:
            try:
                return np.array(Image.open(io.BytesIO(given)).convert("RGB"))
            except OSError:
                return None


def test_nvimagecodec_decodes_what_it_can_and_the_cpu_the_rest(
    batch: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    assert_decoded(NvImageCodecDecoder("cpu").decode(batch, Geometry(64), 30), batch)
    (error,) = NvImageCodecDecoder("cpu").decode([b"no picture"], Geometry(64)).errors
    assert isinstance(error, BadImageError)


class FakeStreams:
    """torch.cuda's streams, each thread with its own current one; `events` lists what each stream is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.events, self._local = 0, [], threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", self.create)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current())
        monkeypatch.setattr(torch, "as_tensor", lambda image, device: torch.from_numpy(image))
        monkeypatch.setattr(gpu_decoders, "_idle_streams", defaultdict(deque))

    def create(self, device: str) -> SimpleNamespace:
        self.made += 1
        stream = SimpleNamespace(device=device, cuda_stream=self.made)
        stream.synchronize = lambda: self.events.append(("waited", stream.cuda_stream))
        return stream

    def current(self) -> SimpleNamespace:
        return getattr(self._local, "stream", SimpleNamespace(cuda_stream=0))

    @contextmanager
    def use(self, stream: SimpleNamespace) -> Iterator[None]:
        self._local.stream = stream
        yield
        del self._local.stream


def test_a_call_has_a_stream_of_its_own_and_waits_for_it_once(
    pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads at once have two streams, which later calls use again; also after an error."""
    streams = FakeStreams(monkeypatch)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    stack, in_stack = gpu_decoders.stack, threading.Barrier(2)

    def noted(images: Any, device: str) -> Any:
        in_stack.wait(30)  # so that both calls are under way
        streams.events.append(("stacked", streams.current().cuda_stream))
        return stack(images, device)

    monkeypatch.setattr(gpu_decoders, "stack", noted)
    jpegs = [encode(photograph(picture, 100, 90), "JPEG", quality=95) for picture in pictures[:3]]
    decoder = NvImageCodecDecoder("cuda:1")
    FakeCodec.streams.clear()
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: decoder.decode(jpegs, Geometry(64)).pixels, range(2))
        assert isinstance(first, torch.Tensor) and first.equal(second)
    assert sorted(FakeCodec.streams) == [1, 1, 2, 2] and streams.made == 2
    for stream in (1, 2):
        assert [kind for kind, number in streams.events if number == stream] == ["stacked", "waited"] * 2

    monkeypatch.setattr(gpu_decoders, "stack", lambda images, device: 1 / 0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            decoder.decode(jpegs, Geometry(64))
    assert streams.made == 2 and [kind for kind, _ in streams.events[-3:]] == ["waited"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", decoders.DECODERS[2:])
def test_a_gpu_decodes(batch: list[Any], name: str) -> None:
    if (reason := decoders.unavailable_reason(name)) is not None:
        pytest.skip(reason)
    decoded: Any = choose_decoder(name, "cuda:0").decode(batch, Geometry(64), 30)
    assert decoded.pixels.is_cuda
    assert_decoded(DecodedBatch(decoded.errors, decoded.pixels.cpu()), batch)


def test_nvimagecodec_has_a_decoder_a_thread(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    jpeg = encode(photograph(pictures[4], 100, 90), "JPEG", quality=95)
    decoder = NvImageCodecDecoder("cpu")
    both = threading.Barrier(2)

    def decode(_: int) -> Any:
        both.wait(30)  # so that each is decoded in a thread of its own
        return decoder.decode([jpeg], Geometry(64)).pixels

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(decode, range(2))
    assert (first == second).all()


def test_the_choice_and_its_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected decoder to be one of auto, cpu, cpu-exact, torchcodec"):
        choose_decoder("abacus")
    monkeypatch.setattr(decoders, "_missing", lambda module: module.startswith("nvidia"))
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    assert choose_decoder("cpu").name == choose_decoder().name == choose_decoder("auto", "cuda:0").name == "cpu"
    assert choose_decoder("cpu-exact").name == "cpu-exact"
    with pytest.raises(RuntimeError, match="decoder='torchcodec' can't run here: PyTorch sees no NVIDIA GPU"):
        choose_decoder("torchcodec")
    with pytest.raises(RuntimeError, match=r"nvidia\.nvimgcodec can't be found; pip install nvidia-nvimgcodec-cu12"):
        choose_decoder("nvimagecodec")
    monkeypatch.setattr(machine, "this_gpu", lambda: GPU)
    chosen: Any = choose_decoder("auto", "cuda:1")
    assert (chosen.name, chosen.device) == ("torchcodec", "cuda:1"), "on the GPU of the encoder"
    assert choose_decoder("auto", None).name == "cpu", "an encoder on a CPU"
    monkeypatch.setattr(decoders, "_missing", lambda module: False)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    assert choose_decoder("auto", "cuda:0").name == choose_decoder("nvimagecodec").name == "nvimagecodec"
    monkeypatch.setattr(decoders, "_missing", lambda module: module == "torch")
    with pytest.raises(RuntimeError, match="torch can't be found"):
        choose_decoder("torchcodec")
