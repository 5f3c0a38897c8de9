"""benchmarks/peer_infinity.py: what counts as a right answer. Its names of weights are checked by every answer."""

from __future__ import annotations

import base64
import json

import numpy as np

from benchmarks.peer_infinity import infinity_queries


def test_an_embedding_is_compared_with_that_of_our_encoder() -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    queries = infinity_queries([b"one", b"two", b"three"], rows, "clip", "/embeddings")
    (uri,) = json.loads(queries.bodies[1])["input"]
    kind, _, content = uri.partition(",")
    assert (kind, base64.b64decode(content)) == ("data:image/jpeg;base64", b"two")
    off = (rows[1] + 0.1) / np.linalg.norm(rows[1] + 0.1)
    for answer, wrong in ((rows[1], False), (rows[2], True), (off, True), (rows[1] * np.nan, True)):
        assert queries.is_wrong(1, {"data": [{"embedding": answer.tolist()}]}) is wrong
