"""The load test of the HTTP server: what it counts, that it never waits, and that a dead server ends it. No timing is
asserted."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import typer
from aiohttp import web
from PIL import Image
from typer.testing import CliRunner

from iosr_fast.exceptions import MissingPackageError
from tests.serving.http_client import bundle
from tools import load_test
from tools.serving_load import churn, rows
from tools.serving_load.client import Answer, Client, Queries, closed_loop, make_queries, new_session, open_loop
from tools.serving_load.contenders import Contender
from tools.serving_load.infinity import check_installed, infinity_queries

SECONDS = 1


def run_tool(path: Path, *options: str) -> tuple[Any, list[dict[str, Any]]]:
    app = typer.Typer()
    app.command()(load_test.main)
    words = ["--json", str(path), "--seconds", str(SECONDS), "--rounds", "1", *options]
    done = CliRunner().invoke(app, words)
    assert path.exists(), done.output
    assert gc.get_freeze_count() == 0, "what stays frozen is reported as leaked by extension modules at exit"
    return done, json.loads(path.read_text())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "_PAUSE_S", 0.05)
    monkeypatch.setattr(load_test, "LONE", 20)


@pytest.mark.slow
def test_two_servers_are_loaded_in_turns_and_no_answer_is_torn_while_classes_change(
    quick: None, tmp_path: Path
) -> None:
    options = ("--bundle", str(bundle()), "--load", "0.3", "--rival", "serve --decode-threads 1", "--churn")
    done, made = run_tool(tmp_path / "rows.json", *options, "--deadline-ms", "20000")
    assert done.exit_code in (0, 1), done.output
    assert [(row["case"], row["server"]) for row in made] == [
        (case, server) for case in ("lone", "capacity", "load", "churn") for server in ("this", "rival")
    ]
    for row in made:
        assert {"device", "versions", "commit", "memory_mb", "client_cpu_share"} <= row.keys()
        assert row["sent"] == row["ok"] + row["refused"] + row["errors"] and row["wrong"] == row["errors"] == 0
        assert row["ok"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0
        assert row["server_options"] == (["--decode-threads", "1"] if row["server"] == "rival" else [])
        assert ("p50_of_rival" in row) is (row["server"] == "this")
    assert made[4]["sent"] == made[5]["sent"], "both get the same load"
    for row in made[6:]:
        assert row["changes"] == churn.ADDED + SECONDS * churn.CHANGES_A_SECOND and row["changes_failed"] == 0, row
        assert row["changes_lost"] == row["torn"] == 0 < row["of_changed_classes"] and row["versions_seen"] > 1


@pytest.mark.slow
def test_one_server_of_two_classifiers_is_loaded_beside_two_servers(quick: None, tmp_path: Path) -> None:
    done, made = run_tool(tmp_path / "rows.json", "--classifiers", "2", "--model", "demo")
    assert done.exit_code == 0, done.output
    assert [(row["case"], row["server"]) for row in made] == [
        *(("lone", server) for server in ("one", "each")),
        ("all", "one"),
        *(("capacity", server) for server in ("one", "each")),
    ]
    for row in made:
        assert row["classifiers"] == 2 and row["ok"] == row["sent"] > 0 and row["wrong"] == 0
    assert 0.2 < made[2]["of_one"] < 5 and made[1]["memory_mb"] > 1.2 * made[0]["memory_mb"]


@pytest.mark.slow
def test_a_server_that_dies_is_an_error_and_leaves_a_partial_report(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(contender: Contender, client: Client, seconds: float) -> None:
        os.kill(contender.servers[0].process.pid, signal.SIGKILL)
        await load_test.alone(contender, client, "lone")

    monkeypatch.setattr(load_test, "capacity", killed)
    done, made = run_tool(tmp_path / "rows.json", "--bundle", str(bundle()))
    assert done.exit_code == 1 and "ended with code -9" in done.output
    assert [row["case"] for row in made] == ["lone"] and made[0]["ok"] > 0


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    contender = Contender.of_bundles("this", Queries([], lambda *_: False), [[tmp_path / "nothing-here"]], None)
    with pytest.raises(RuntimeError, match=r"code 2(.|\n)*nothing-here"), contender.running():
        pass


def test_what_cannot_be_loaded_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="expected a saved classifier"):
        load_test.main(tmp_path / "rows.json", tmp_path)
    with pytest.raises(typer.BadParameter, match="expected --churn with one classifier"):
        load_test.main(tmp_path / "rows.json", classifiers=2, changes=True)
    with pytest.raises(MissingPackageError, match=r"infinity-emb is needed .* -m venv .*pip install"):
        check_installed(tmp_path)


def test_what_counts_as_an_answer() -> None:
    def labelled(label: str) -> str:
        return json.dumps({"predictions": [{"label": label}]})

    script = iter(
        [(200, labelled("cat")), (200, labelled("dog")), (503, "{}", "1"), (503, "{}"), (504, "{}"), (200, "{")]
    )

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        status, body, *retry = next(script, (0, ""))
        if not status:
            request.transport.abort()  # type: ignore[union-attr]
            return web.Response()
        return web.Response(status=status, text=body, headers={"Retry-After": retry[0]} if retry else {})

    async def talk() -> list[Answer]:
        app = web.Application()
        app.router.add_post("/v1/predict", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        queries = Queries([b"x"], lambda _, content: content["predictions"][0]["label"] != "cat")
        async with new_session() as session:
            client = Client(session, [f"http://127.0.0.1:{runner.addresses[0][1]}"], queries, 1000)
            answers = [await client.predict(0) for _ in range(7)]
        await runner.cleanup()
        return answers

    answers = asyncio.run(talk())
    assert [answer.wrong for answer in answers] == [False, True, *[False] * 5]
    outcomes = ["ok", "ok", "refused", "no Retry-After", "status 504: {}", "unreadable answer: JSONDecodeError"]
    assert [answer.outcome for answer in answers[:6]] == outcomes and answers[6].outcome.endswith("Error")
    row = rows.row_of([(answers[:3], {"n": 1, "t": 2.0}), (answers[3:], {"n": 2, "t": 4.0})])
    counts = ("rounds", "sent", "ok", "refused", "errors", "wrong", "n", "t")
    assert [row[name] for name in counts] == [2, 7, 2, 1, 4, 1, 3, 3.0]
    problem = rows.problems_of({**row, "case": "load", "load": 0.5, "late": 2, "changes_lost": 3})
    assert problem.startswith("load 0.5: wrong: 1; errors: 4; changes_lost: 3; late: 2; refused: 1; {")
    assert rows.problems_of({"case": "load", "load": 1.2, "refused": 9, "late": 1, "error_kinds": {}}) == ""


def test_latency_counts_from_when_a_request_was_due() -> None:
    answers = [Answer(0.01 * i, 0.01 * i + 0.5, 0.01 * i + 0.6, "ok") for i in range(11)]
    row = rows.row_of([(answers, {})])
    assert (row["p50_ms"], row["send_lag_p99_ms"], row["ok_rps"]) == (600.0, 500.0, 100.0)
    slower = [Answer(one.due, one.sent, one.due + 1.2, "ok") for one in answers]
    ours, theirs = (Contender(name, Queries([], lambda *_: False), [], commit="abc") for name in ("this", "rival"))
    ours.rounds["lone", None], theirs.rounds["lone", None] = [(answers, {})] * 2, [(slower, {}), (answers, {})]
    made, rival = rows.make_rows([ours, theirs])
    assert (made["p50_of_rival"], made["p99_of_rival"], made["rps_of_rival"]) == (0.75, 0.75, 1.0)
    assert "p50_of_rival" not in rival


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_a_rate_is_that_of_whole_batches(batch: int) -> None:
    done = [at for at in np.arange(1, 21) * batch / 20.0 for _ in range(batch)]  # 20 pictures a second
    assert rows.rps([Answer(0.0, 0.0, at, "ok") for at in done]) == pytest.approx(20, rel=0.12)


def test_an_open_loop_never_waits() -> None:
    asked: list[tuple[int, float]] = []

    async def talk() -> list[Any]:
        everyone = asyncio.Event()

        async def ask(number: int, due: float) -> Any:
            asked.append((number, due))
            if len(asked) == 30:
                everyone.set()
            await everyone.wait()  # nobody is answered before the last one has asked
            return number

        return await asyncio.wait_for(open_loop(ask, 300, 0.1), 20)

    assert asyncio.run(talk()) == list(range(30))
    assert np.allclose(np.diff([due for _, due in asked]), 1 / 300)


def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    class Counting:
        running = most = 0
        asked: ClassVar[set[int]] = set()

        async def predict(self, number: int) -> Answer:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.001)
            self.running -= 1
            self.asked.add(number)
            return Answer(0.0, 0.0, 0.001, "ok")

    client = Counting()
    asyncio.run(closed_loop(client, 3, 0.2))  # type: ignore[arg-type]
    assert client.most == 3 and {0, 1, 2, 3, 4, 5} <= client.asked


def test_an_answer_of_two_versions_is_torn() -> None:
    versions = churn.classes_by_version(4, {"~0": "a", "~1": "b"}, [(6, "~0", None), (5, "~2", "c")])
    assert versions == {4: {"~0": "a", "~1": "b"}, 5: {"~0": "a", "~1": "b", "~2": "c"}, 6: {"~1": "b", "~2": "c"}}
    for version, inner, named, torn in (
        (5, 5, {"~2": "c", "~0": "a"}, False),
        (4, 4, {"~2": "c", "~0": "a"}, True),  # not there yet
        (6, 6, {"~1": "b", "~0": "a"}, True),  # gone
        (5, 5, {"~2": "b", "~0": "a"}, True),  # another's name
        (5, 4, {"~2": "c", "~0": "a"}, True),
        (7, 7, {"~1": "b", "~2": "c"}, True),  # a version that no change made
        (5, 5, {"~2": "c"}, True),  # too few
    ):
        assert churn.is_torn((2, version, inner, named), versions) is torn, (version, named)


def test_photographs_are_sent_to_a_clip_of_another_size() -> None:
    predicted = [SimpleNamespace(label=label) for label in "012"]
    larger: Any = SimpleNamespace(encoder=SimpleNamespace(image_size=224), explain=lambda images, top: predicted)
    queries = make_queries(larger, 3)
    sizes = [Image.open(io.BytesIO(image), formats=("JPEG",)).size for image in queries.bodies]
    assert sizes == [(500, 375)] * 3 and len(set(queries.bodies)) == 3 and queries.content_type == "image/jpeg"
    answer = {"predictions": [{"label": "2"}]}
    assert [queries.is_wrong(number, answer) for number in range(3)] == [True, True, False]


def test_an_embedding_is_compared_with_that_of_our_encoder() -> None:
    expected = np.eye(3, 4, dtype=np.float32)
    queries = infinity_queries([b"one", b"two", b"three"], expected, "clip", "/embeddings")
    (uri,) = json.loads(queries.bodies[1])["input"]
    kind, _, content = uri.partition(",")
    assert (kind, base64.b64decode(content)) == ("data:image/jpeg;base64", b"two")
    off = (expected[1] + 0.1) / np.linalg.norm(expected[1] + 0.1)
    for answer, wrong in ((expected[1], False), (expected[2], True), (off, True), (expected[1] * np.nan, True)):
        assert queries.is_wrong(1, {"data": [{"embedding": answer.tolist()}]}) is wrong
