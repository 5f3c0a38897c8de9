"""Fewer tokens: merged ones against a literal ToMe in float64, smaller pictures against open_clip's interpolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from iosr_fast.clip.dual_encoder import DualEncoder  # noqa: E402
from iosr_fast.clip.dual_pools import AveragePool  # noqa: E402
from iosr_fast.clip.fuse import build_dual_encoder  # noqa: E402
from iosr_fast.clip.resize import resize_clip  # noqa: E402
from iosr_fast.clip.token_merging import merge_tokens, merged_per_block  # noqa: E402
from iosr_fast.clip.two_pass import two_passes  # noqa: E402
from iosr_fast.encoders.runtimes.onnxruntime import OnnxRuntimeEncoder  # noqa: E402
from iosr_fast.encoders.runtimes.openvino import OpenVINOEncoder  # noqa: E402
from iosr_fast.exceptions import IosrFastError  # noqa: E402
from iosr_fast.export.onnx_export import export_onnx  # noqa: E402
from iosr_fast.export.plain_graph import write_plain_graph  # noqa: E402
from tests.clip.small_clip import random_adapter, random_pixels, small_clip  # noqa: E402
from tests.clip.test_dual_encoder import run  # noqa: E402


def literal_merge(
    x: np.ndarray, sizes: np.ndarray, keys: np.ndarray, count: int, prefix: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """ToMe's algorithm 1 for one picture, token by token: x (L, W), sizes (L,), keys (heads, L, d)."""
    metric = keys.mean(0)
    metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    sources, targets = list(range(prefix + 1, len(x), 2)), list(range(prefix, len(x), 2))
    best = {a: max(targets, key=lambda b: metric[a] @ metric[b]) for a in sources}
    moved = sorted(sources, key=lambda a: -(metric[a] @ metric[best[a]]))[:count]
    total = {b: sizes[b] for b in targets}
    value = {b: x[b] * sizes[b] for b in targets}
    for a in moved:
        total[best[a]] += sizes[a]
        value[best[a]] = value[best[a]] + x[a] * sizes[a]
    stay = [*range(prefix), *(a for a in sources if a not in moved)]
    rows = [x[a] for a in stay] + [value[b] / total[b] for b in targets]
    return np.stack(rows), np.array([sizes[a] for a in stay] + [total[b] for b in targets])


@pytest.mark.parametrize(("length", "count"), [(2, 0), (3, 1), (8, 3), (17, 8), (50, 1), (50, 24)])
@pytest.mark.parametrize("first", [True, False])
def test_merges_as_tome_does(length: int, count: int, first: bool) -> None:
    rng = np.random.default_rng(length + count)
    x, keys = rng.standard_normal((3, length, 5)), rng.standard_normal((3, 2, length, 7))
    sizes = np.ones((3, length)) if first else rng.integers(1, 9, (3, length)).astype(float)
    given = None if first else torch.tensor(sizes, dtype=torch.float32)
    if not count:
        assert merged_per_block(length - 1, 4, 9) == [0, 0, 0, 0]
        return
    got, new = merge_tokens(torch.tensor(x).float(), given, torch.tensor(keys).float(), count)
    for i in range(3):
        expected, total = literal_merge(x[i], sizes[i], keys[i], count)
        np.testing.assert_allclose(got[i], expected, atol=1e-5)
        np.testing.assert_allclose(new[i], total)
    assert got.shape == (3, length - count, 5) and float(new.sum()) == sizes.sum()


class LiteralPass:
    """One stream of an encoder with merged tokens, one picture at a time, in float64."""

    def __init__(self, encoder: DualEncoder, adapted: bool) -> None:
        self.encoder, self.adapted, self.merged = encoder.double(), adapted, encoder.merged

    def __call__(self, x: Any) -> np.ndarray:
        sizes, reads_cls = np.ones(len(x)), self.encoder.pool is None
        blocks = self.encoder.blocks[:-1] if reads_cls else self.encoder.blocks
        for block, merged in zip(blocks, self.merged, strict=not reads_cls):
            x, keys = self.attention(block, x, sizes)
            if merged:
                rows, sizes = literal_merge(x.numpy(), sizes, keys.numpy(), merged, self.encoder.shapes.prefix)
                x = torch.tensor(rows)
            x = x + block.mlp(x) + (block.adapt(x) if self.adapted and block.adapted else 0)
        if not reads_cls:
            row = self.encoder.proj(self.pooled(x, torch.tensor(sizes)))
            return np.asarray(row / row.norm())
        block = self.encoder.blocks[-1]
        y = block.ln_1(x)
        heads, width = block.heads, x.shape[1]
        q = block.q_proj(y[:1]).reshape(heads, 1, width // heads)
        keys, values = y @ block.k_weight.transpose(1, 2), y @ block.v_weight
        weights = torch.softmax(q @ keys.transpose(1, 2) + torch.tensor(sizes).log(), -1)
        cls = x[0] + block.out_proj((weights @ values).reshape(width))
        cls = cls + block.mlp(cls) + (block.adapt(cls) if self.adapted and block.adapted else 0)
        row = self.encoder.proj(self.encoder.ln_post(cls))
        return np.asarray(row / row.norm())

    def pooled(self, x: Any, sizes: Any) -> Any:
        """The tokens repeated as often as they have patches."""
        encoder, pool = self.encoder, self.encoder.pool
        x = torch.cat([row.repeat(int(size), 1) for row, size in zip(x, sizes, strict=True)])
        if isinstance(pool, AveragePool):
            mean = (x if encoder.shapes.norm_after_pool else encoder.ln_post(x))[encoder.shapes.prefix :].mean(0)
            return encoder.ln_post(mean) if encoder.shapes.norm_after_pool else mean
        y = encoder.ln_post(x)
        weights = torch.softmax(pool.query(y), dim=0)
        heads = [weights[:, h] @ y @ pool.v_weight[h] for h in range(weights.shape[1])]
        row = pool.out_proj(torch.cat(heads))
        return row + pool.feed(pool.ln(row))

    @staticmethod
    def attention(block: Any, x: Any, sizes: np.ndarray) -> tuple[Any, Any]:
        y = block.ln_1(x)
        q, k, v = (
            proj(y).reshape(len(x), block.heads, -1).transpose(0, 1)
            for proj in (block.q_proj, block.k_proj, block.v_proj)
        )
        weights = torch.softmax(q @ k.transpose(1, 2) + torch.tensor(sizes).log(), -1)
        return x + block.out_proj((weights @ v).transpose(0, 1).reshape(len(x), -1)), k


@pytest.mark.parametrize(("first", "merged"), [(0, 3), (1, 5), (2, 99), (None, 4)])
def test_each_stream_is_a_literal_pass(first: int | None, merged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, pixels = small_clip(), random_pixels(3, 32)
    adapter = None if first is None else random_adapter(clip, first)
    encoder = build_dual_encoder(clip, adapter, merged=merged)
    assert encoder.merged[0] == min(merged, 8) and encoder.merged[-1] == 0
    outputs = run(encoder, pixels)
    monkeypatch.setattr("iosr_fast.clip.dual_blocks.Norm.forward", torch.nn.LayerNorm.forward)
    exact = build_dual_encoder(clip, adapter, merged=merged)
    with torch.inference_mode():
        embedded = exact._embed(torch.from_numpy(pixels)).double()
        for adapted, got in enumerate(outputs):
            literal = LiteralPass(exact, bool(adapted))
            np.testing.assert_allclose(got, np.stack([literal(x) for x in embedded]), atol=2e-5)


@pytest.mark.parametrize("family", ["clipa", "mean-of-norms", "siglip", "registers", "mobileclip-b"])
def test_families_merge_alike(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.clip.families import family_clip

    clip = family_clip(family)
    adapter, pixels = random_adapter(clip, 1), random_pixels(2, clip.image_size)
    encoder = build_dual_encoder(clip, adapter, merged=3)
    outputs = run(encoder, pixels)
    # mean-of-norms pools as clipa and mobileclip-b as vit, below; their stem and scales are exported in test_families.
    if family in ("clipa", "siglip", "registers"):
        export_onnx(encoder, tmp_path / "encoder.onnx")
        session = ort.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
        for got, expected in zip(session.run(None, {"pixels": pixels}), outputs, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    monkeypatch.setattr("iosr_fast.clip.dual_blocks.Norm.forward", torch.nn.LayerNorm.forward)
    exact = build_dual_encoder(clip, adapter, merged=3)
    with torch.inference_mode():
        embedded = exact._embed(torch.from_numpy(pixels)).double()
        for adapted, got in enumerate(outputs):
            literal = LiteralPass(exact, bool(adapted))
            np.testing.assert_allclose(got, np.stack([literal(x) for x in embedded]), atol=2e-5)


def test_rotated_tokens_are_not_merged() -> None:
    from tests.clip.families import family_clip

    with pytest.raises(IosrFastError, match="rotary positions"):
        build_dual_encoder(family_clip("pe-core"), merged=2)


def test_no_merging_is_the_encoder_of_before(tmp_path: Path) -> None:
    clip, pixels = small_clip(), random_pixels(2, 32)
    adapter = random_adapter(clip, 1)
    for got, expected in zip(
        run(build_dual_encoder(clip, adapter, merged=0), pixels), two_passes(clip, adapter, pixels), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    config = build_dual_encoder(clip, adapter).config
    assert config.pop("merged") == 0  # engines of before have no such field
    assert DualEncoder.from_config(config).shapes.merged == 0
    with pytest.raises(IosrFastError, match="expected the fields"):
        DualEncoder.from_config(config | {"other": 1})
    with pytest.raises(IosrFastError, match="merged of at least 0"):
        build_dual_encoder(clip, adapter, merged=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "merged"), [(0, 3), (1, 5)])
def test_the_exported_graph_merges_alike(first: int, merged: int, tmp_path: Path) -> None:
    clip = small_clip()
    encoder = build_dual_encoder(clip, random_adapter(clip, first), merged=merged)
    export_onnx(encoder, tmp_path / "encoder.onnx")
    assert write_plain_graph(tmp_path)
    facts = {"model": "small", "image_size": 32, "width": 24, "fingerprint": "f", "max_batch": 8, "precision": "fp32"}
    for kind in (OnnxRuntimeEncoder, OpenVINOEncoder):
        both, plain = (kind(tmp_path, {**facts, "first_adapted_block": first}, 1, 1, form) for form in (True, False))
        for batch in (1, 2, 5):
            pixels = random_pixels(batch, 32)
            expected, got = run(encoder, pixels), both.encode(pixels)
            np.testing.assert_allclose(got.plain, expected[0], atol=1e-5)
            np.testing.assert_allclose(got.adapted, expected[1], atol=1e-5)
            np.testing.assert_allclose(plain.encode(pixels).plain, expected[0], atol=1e-5)


@pytest.mark.parametrize("size", [24, 16, 8])
def test_smaller_pictures_take_open_clips_positions(size: int) -> None:
    clip = small_clip()
    smaller = resize_clip(clip, size)
    assert (smaller.image_size, smaller.fingerprint) == (size, clip.fingerprint)
    state = {"visual.positional_embedding": clip.model.visual.positional_embedding.clone()}
    open_clip.model.resize_pos_embed(state, smaller.model, antialias=True)
    got = smaller.model.visual.positional_embedding
    torch.testing.assert_close(got, state["visual.positional_embedding"], atol=1e-6, rtol=0)
    assert torch.equal(got[0], clip.model.visual.positional_embedding[0])
    assert clip.model.visual.image_size == (32, 32) and smaller.model.visual.conv1 is clip.model.visual.conv1
    adapter, pixels = random_adapter(clip, 1), random_pixels(3, size)
    for row, expected in zip(
        run(build_dual_encoder(smaller, adapter), pixels), two_passes(smaller, adapter, pixels), strict=True
    ):
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_sizes_are_checked() -> None:
    clip = small_clip()
    assert resize_clip(clip, clip.image_size) is clip
    for size in (0, 20, 40):
        with pytest.raises(IosrFastError, match=f"a multiple of 8, .* up to 32, got {size}"):
            resize_clip(clip, size)
