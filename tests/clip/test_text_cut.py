"""Texts cut behind their end tokens have the embeddings of open_clip's encode_text on the whole context."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the cpu extra")
pytest.importorskip("open_clip", reason="open_clip comes with the cpu extra")

from iosr_fast.clip.load import load_clip  # noqa: E402
from iosr_fast.clip.prompts import embed_classes  # noqa: E402
from iosr_fast.clip.text_tower import encode_tokens, end_token  # noqa: E402


def test_cut_texts_equal_whole_ones() -> None:
    clip = load_clip("demo")
    tokens = clip.tokenizer(["a cat", "", "word " * 100, "a drawing of a very small red house"])
    assert end_token(clip) == clip.tokenizer.eot_token_id
    with torch.inference_mode():
        for some in (tokens[:2], tokens):
            expected = clip.model.encode_text(some, normalize=True)
            np.testing.assert_allclose(encode_tokens(clip, some).numpy(), expected.numpy(), atol=1e-6)


def test_batches_of_texts_keep_classes_apart() -> None:
    clip = load_clip("demo")
    names = [f"number {i}" for i in range(9)]
    together = embed_classes(clip, names, ["{}", "a {}", "an icon of {}", "the {}", "one {}"])
    alone = [embed_classes(clip, [name], ["{}", "a {}", "an icon of {}", "the {}", "one {}"])[0] for name in names]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)
