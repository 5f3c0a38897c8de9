"""Which decoder is chosen and why not, and the GPU decoders' batches: their calls against stand-ins.
None of it needs a GPU; none of it shows that a GPU does it."""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image, ImageOps

torch = pytest.importorskip("torch")

from iosr_fast.benchmarks.photographs import photograph  # noqa: E402
from iosr_fast.clip.demo.pictures import load_pictures  # noqa: E402
from iosr_fast.encoders.runtimes import plans  # noqa: E402
from iosr_fast.exceptions import BadImageError  # noqa: E402
from iosr_fast.images import decoders, gpu_decoders  # noqa: E402
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


def assert_decoded(made: list[Any], sources: list[Any]) -> None:
    for i, (pixels, source) in enumerate(zip(made, sources, strict=True)):
        if i in (4, 5, 6):
            assert isinstance(pixels, BadImageError) and pixels.position == 30 + i
            continue
        expected = resize_and_crop(open_image(source), Geometry(64))
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - expected).mean() <= 1


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
        (found,) = made("cpu", exif_orientation=chosen).decode([data], Geometry(64))
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
    assert isinstance(NvImageCodecDecoder("cpu").decode([b"no picture"], Geometry(64))[0], BadImageError)


def test_nvimagecodec_decodes_on_the_stream_that_torch_reads_on_with_a_decoder_a_thread(
    pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the old code, with one decoder for all threads and no stream, both assertions fail."""
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    jpeg = encode(photograph(pictures[4], 100, 90), "JPEG", quality=95)
    decoder = NvImageCodecDecoder("cpu")
    both = threading.Barrier(2)

    def decode(_: int) -> Any:
        both.wait(30)  # so that each is decoded in a thread of its own
        return decoder.decode([jpeg], Geometry(64))[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(decode, range(2))
    assert (first == second).all()

    decoder = NvImageCodecDecoder("cuda:1")
    current = {"cuda:1": SimpleNamespace(cuda_stream=77)}
    monkeypatch.setattr(torch.cuda, "current_stream", current.__getitem__)
    monkeypatch.setattr(torch, "as_tensor", lambda image, device: torch.from_numpy(image))
    FakeCodec.streams.clear()
    decoder.decode([jpeg], Geometry(64))
    assert FakeCodec.streams == [77]


def test_the_choice_and_its_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected decoder to be one of auto, cpu, cpu-exact, torchcodec"):
        choose_decoder("abacus")
    monkeypatch.setattr(decoders, "_missing", lambda module: module.startswith("nvidia"))
    monkeypatch.setattr(machine, "this_gpu", lambda: None)
    assert choose_decoder("cpu").name == choose_decoder().name == choose_decoder("auto", "tensorrt").name == "cpu"
    assert choose_decoder("cpu-exact").name == "cpu-exact"
    with pytest.raises(RuntimeError, match="decoder='torchcodec' can't run here: PyTorch sees no NVIDIA GPU"):
        choose_decoder("torchcodec")
    with pytest.raises(RuntimeError, match=r"nvidia\.nvimgcodec can't be found; pip install nvidia-nvimgcodec-cu12"):
        choose_decoder("nvimagecodec")
    monkeypatch.setattr(machine, "this_gpu", lambda: GPU)
    assert choose_decoder("auto", "tensorrt").name == "torchcodec"
    assert choose_decoder("auto", "onnxruntime").name == "cpu"
    monkeypatch.setattr(decoders, "_missing", lambda module: False)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", FakeCodec)
    assert choose_decoder("auto", "tensorrt_rtx").name == choose_decoder("nvimagecodec").name == "nvimagecodec"
    monkeypatch.setattr(decoders, "_missing", lambda module: module == "torch")
    with pytest.raises(RuntimeError, match="torch can't be found"):
        choose_decoder("torchcodec")
