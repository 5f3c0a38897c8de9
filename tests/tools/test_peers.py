"""Servers against each other: the peer's requests and model, the order of loads, ratios. No timing is asserted."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with the dev extra")

from tests.serving.http_client import bundle, load  # noqa: E402
from tools.serving_load import compare, peer, peer_model, versus  # noqa: E402
from tools.serving_load.client import Queries, make_queries, steady_rps  # noqa: E402
from tools.serving_load.measure import Load  # noqa: E402
from tools.serving_load.report import peer_goals  # noqa: E402
from tools.serving_load.server import ServerProcess  # noqa: E402

INSTALLED = compare._BUILD / "infinity"


def test_the_vocabulary_is_open_clips(tmp_path: Path) -> None:
    tokenizer = pytest.importorskip("open_clip.tokenizer", reason="open_clip comes with the cpu extra")
    theirs = tokenizer.SimpleTokenizer()
    vocabulary, merges = peer_model.write_vocabulary(Path(tokenizer.default_bpe()), tmp_path)
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()[1:]
    # open_clip writes the two special tokens otherwise; their numbers are those of transformers.
    special = {word: number for word, number in theirs.encoder.items() if number >= len(theirs.encoder) - 2}
    assert {word: n for word, n in words.items() if n < len(words) - 2} == {
        word: n for word, n in theirs.encoder.items() if word not in special
    }
    assert sorted(words.values()) == list(range(49408))
    assert {tuple(line.split()): rank for rank, line in enumerate(lines)} == theirs.bpe_ranks


def test_a_peers_answer_is_compared_with_its_model() -> None:
    rows = np.eye(3, 4, dtype=np.float32)
    queries = peer.make_peer_queries([b"one", b"two", b"three"], rows)
    asked = json.loads(queries.images[1])
    assert asked["modality"] == "image" and len(asked["input"]) == 1
    kind, _, content = asked["input"][0].partition(",")
    assert (kind, base64.b64decode(content)) == ("data:image/jpeg;base64", b"two")
    off = rows[1] + 0.1
    for answer, wrong in (
        (rows[1], False),
        (rows[2], True),
        (off / np.linalg.norm(off), True),
        (rows[1] * np.nan, True),
    ):
        assert queries.is_wrong(1, {"data": [{"embedding": answer.tolist()}]}) is wrong
    with pytest.raises((ValueError, KeyError)):
        queries.is_wrong(1, {"data": []})


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_a_rate_is_that_of_whole_batches(batch: int) -> None:
    done = [at for at in np.arange(1, 21) * batch / 20.0 for _ in range(batch)]  # 20 pictures a second
    assert steady_rps(done, 2.0, done[-1]) == pytest.approx(20, rel=0.12)


def test_ratios_are_medians_of_the_rounds() -> None:
    def row(name: str, *rates: float, p99_ms: float = 100.0) -> dict[str, Any]:
        rounds = [{"pictures_per_s": rate} for rate in rates]
        return {"server": name, "rounds": rounds, "lone_ms": 40.0, "runs": [{"load": 0.8, "p99_ms": p99_ms}]}

    rows = [row("ours", 30, 60, 44), row("slow", 10, 10, 10, p99_ms=130.0), row("peer", 10, 15, 11)]
    made = versus.ratios(rows, "peer")
    assert made == {"ours": 4.0, "slow": 0.909}
    report = {"servers": rows, "ratios": made, "max_wait_ms": 2.0}
    goals = peer_goals(report, {"ours": 3.3, "slow": 1.15})
    assert [(goal["limit"], goal["measured"], goal["met"]) for goal in goals] == [
        (3.3, 4.0, True),
        (122.0, 100.0, True),
        (1.15, 0.909, False),
        (122.0, 130.0, False),
    ]


@pytest.mark.slow
def test_servers_are_loaded_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versus, "_WARMUP_S", 0.2)
    monkeypatch.setattr(versus, "PAUSE_S", 0.1)
    queries = make_queries(load(), 8)
    short = Load(0.5, 60_000, loads=(0.5,), lone=5, capacity_seconds=0.5)
    with ServerProcess(bundle()) as first, ServerProcess(bundle()) as second:
        names = {"a": first, "b": second}
        contenders = [versus.Contender(name, server, queries, {"version": "1"}) for name, server in names.items()]
        rows = asyncio.run(versus.measure_versus(contenders, short, rounds=2))
        assert [row["server"] for row in rows] == ["a", "b"]
        for row in rows:
            assert len(row["rounds"]) == 2 and row["wrong"] == 0 and row["lone_ms"] > 0 and len(row["runs"]) == 1
            low, high = row["pictures_per_s_spread"]
            assert 0 < low <= row["pictures_per_s"] <= high
            assert all(each["idle_cpu_share"] <= versus._MAX_IDLE for each in row["rounds"])
        wrong = Queries(queries.images, ["no such label"] * len(queries), queries.content_type)
        with pytest.raises(RuntimeError, match=r"c: expected .* right answers, got"):
            asyncio.run(versus.measure_versus([versus.Contender("c", first, wrong)], short, rounds=1))


@pytest.mark.slow
@pytest.mark.skipif(
    not (INSTALLED / ".installed").exists(),
    reason="infinity-emb is gigabytes large: tools/load_test.py --peer infinity installs it in build/peers",
)
def test_infinity_gives_the_embedding_of_transformers(tmp_path: Path) -> None:
    python = peer.make_environment(INSTALLED)
    paths = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(noise).save(paths[-1], "JPEG")
    embeddings = peer.make_model(python, tmp_path / "clip", paths)
    queries = peer.make_peer_queries([path.read_bytes() for path in paths], embeddings)
    with peer.PeerProcess(python, tmp_path / "clip") as server:

        async def ask() -> list[Any]:
            async with versus.Client(server.url, queries, 60_000) as client:
                return [await client.predict(number) for number in range(2)]

        assert [(answer.status, answer.wrong) for answer in asyncio.run(ask())] == [(200, False)] * 2


def test_photographs_are_sent_to_a_clip_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        class encoder:
            image_size = 224

        @staticmethod
        def explain(images: list[bytes], top: int) -> list[Any]:
            return [type("P", (), {"label": str(number)}) for number in range(len(images))]

    queries = make_queries(Large, 3)  # type: ignore[arg-type]
    sizes = [Image.open(io.BytesIO(image), formats=("JPEG",)).size for image in queries.images]
    assert sizes == [(500, 375)] * 3 and len(set(queries.images)) == 3
    assert queries.content_type == "image/jpeg" and queries.labels == ["0", "1", "2"]
