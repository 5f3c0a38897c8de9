"""The load test of the HTTP server: what it counts, that it never waits, and that a dead server ends it. No timing is
asserted."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from aiohttp import web
from PIL import Image
from typer.testing import CliRunner

from tests.serving.http_client import bundle, load
from tools import load_classifiers, load_test
from tools.serving_load import churn, rows
from tools.serving_load.client import (
    Answer,
    Client,
    Queries,
    arrival_times,
    closed_loop,
    make_queries,
    open_loop,
    steady_rps,
)
from tools.serving_load.server import ServerDied, ServerProcess

SECONDS = 1


def run_tool(path: Path, *options: str) -> tuple[Any, list[dict[str, Any]]]:
    app = typer.Typer()
    app.command()(load_test.main)
    words = ["--bundle", str(bundle()), "--json", str(path), "--seconds", str(SECONDS), "--rounds", "1", *options]
    done = CliRunner().invoke(app, words)
    assert path.exists(), done.output
    assert gc.get_freeze_count() == 0, "what stays frozen is reported as leaked by extension modules at exit"
    return done, json.loads(path.read_text())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "_PAUSE_S", 0.05)
    monkeypatch.setattr(load_test.lone, "__defaults__", (20,))


@pytest.mark.slow
def test_two_servers_are_loaded_in_turns_and_every_answer_is_counted(quick: None, tmp_path: Path) -> None:
    done, made = run_tool(tmp_path / "rows.json", "--load", "0.3", "--rival-serve", "--decode-threads 1")
    assert done.exit_code in (0, 1) and "rps of rival" in done.output, done.output
    assert [(row["case"], row["server"]) for row in made] == [
        (case, server) for case in ("lone", "capacity", "load") for server in ("this", "rival")
    ]
    for row in made:
        assert {"device", "versions", "commit", "rss_mb_end", "client_cpu_share"} <= row.keys()
        assert row["sent"] == row["ok"] + row["refused"] + row["errors"] and row["wrong"] == row["errors"] == 0
        assert row["ok"] > 0 and row["p99_ms"] >= row["p50_ms"] > 0
        assert row["server_options"] == (["--decode-threads", "1"] if row["server"] == "rival" else [])
        assert ("p50_of_rival" in row) is (row["server"] == "this")
    assert made[-2]["sent"] == made[-1]["sent"], "both get the same load"


@pytest.mark.slow
def test_one_server_of_two_classifiers_is_loaded_beside_two_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_classifiers, "LONE", 6)
    monkeypatch.setattr(load_classifiers, "_WARMUP_S", 0.2)
    load_classifiers.main(tmp_path / "rows.json", [2], model="demo", seconds=SECONDS, rounds=1)
    made = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["server"], row["case"]) for row in made] == [
        *(("one", case) for case in ("lone", "capacity", "all")),
        *(("each", case) for case in ("lone", "capacity")),
    ]
    for row in made:
        assert row["classifiers"] == 2 and row["ok"] == row["sent"] > 0 and row["wrong"] == 0
    assert 0.2 < made[2]["of_one"] < 5 and made[3]["memory_mb"] > 1.2 * made[0]["memory_mb"]


@pytest.mark.slow
def test_no_answer_is_torn_while_classes_change(quick: None) -> None:
    seconds = 3 * SECONDS  # in one, all changes may end after the last request on a busy machine
    contender, queries = load_test.Contender("this", [], "abc"), make_queries(load(), 16)
    asyncio.run(load_test._churn(contender, bundle(), queries, load_test.Load(seconds, 1, (), 5000), 40.0))
    (row,) = load_test.make_rows([contender], 5000)
    assert row["sent"] == row["ok"] == 20 * seconds and rows.problems_of(row) == ""
    assert row["changes"] == churn.ADDED + seconds * churn.CHANGES_A_SECOND and row["changes_failed"] == []
    assert row["versions_seen"] > 1 and row["of_changed_classes"] > 0 and row["torn"] == 0
    assert row["last_classes_as_told"]


@pytest.mark.slow
def test_a_server_that_dies_is_an_error_and_leaves_a_partial_report(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(contender: Any, server: ServerProcess, *rest: Any) -> None:
        os.kill(server.pid, signal.SIGKILL)
        await load_test.lone(contender, server, *rest[:1])

    monkeypatch.setattr(load_test, "capacity", killed)
    done, made = run_tool(tmp_path / "rows.json")
    assert done.exit_code == 1 and "the server ended with code -9" in done.output
    assert [row["case"] for row in made] == ["lone"] and made[0]["ok"] > 0


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerDied, match=r"code 2(.|\n)*nothing-here"):
        ServerProcess.of_bundle(tmp_path / "nothing-here")


def test_a_bundle_that_does_not_load_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="expected a saved classifier"):
        load_test.main(tmp_path / "rows.json", tmp_path)


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
        async with Client(f"http://127.0.0.1:{runner.addresses[0][1]}", queries, 1000) as client:
            answers = [await client.predict(0) for _ in range(7)]
        await runner.cleanup()
        return answers

    answers = asyncio.run(talk())
    assert [answer.ok for answer in answers] == [True, True, *[False] * 5]
    assert [answer.wrong for answer in answers] == [False, True, *[False] * 5]
    assert [answer.refused for answer in answers] == [False, False, True, *[False] * 4]
    errors = [answer.error for answer in answers[3:6]]
    assert errors == ["no Retry-After", "status 504", "unreadable answer: JSONDecodeError"]
    assert answers[6].status == 0 and answers[6].error
    row = rows.row_of([(answers[:3], {"n": 1, "t": 2.0}), (answers[3:], {"n": 2, "t": 4.0})], deadline_s=1e-9)
    counts = ("rounds", "sent", "ok", "refused", "errors", "late", "wrong", "n", "t")
    assert [row[name] for name in counts] == [2, 7, 2, 1, 4, 2, 1, 3, 3.0]
    problem = rows.problems_of({**row, "case": "load", "load": 0.5, "last_classes_as_told": False})
    assert problem.startswith("load 0.5: wrong: 1; errors: 4; late: 2; refused: 1; not last_classes_as_told; {")
    assert rows.problems_of({"case": "load", "load": 1.2, "refused": 9, "late": 1, "error_kinds": {}}) == ""


def test_latency_counts_from_when_a_request_was_due() -> None:
    answers = [Answer(due=0.01 * i, sent=0.01 * i + 0.5, done=0.01 * i + 0.6, status=200) for i in range(11)]
    row = rows.row_of([(answers, {})], deadline_s=0.55)
    assert (row["p50_ms"], row["send_lag_p99_ms"], row["late"], row["ok_rps"]) == (600.0, 500.0, 11, 100.0)
    slower = [Answer(a.due, a.sent, a.due + 1.2, 200) for a in answers]
    made = rows.ratios([(answers, {}), (answers, {})], [(slower, {}), (answers, {})])
    assert made == {"p50_of_rival": 0.75, "p99_of_rival": 0.75, "rps_of_rival": 1.0}


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_a_rate_is_that_of_whole_batches(batch: int) -> None:
    done = [at for at in np.arange(1, 21) * batch / 20.0 for _ in range(batch)]  # 20 pictures a second
    assert steady_rps(done, 2.0, done[-1]) == pytest.approx(20, rel=0.12)


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

        return await asyncio.wait_for(open_loop(ask, arrival_times(300, 0.1)), 20)

    assert asyncio.run(talk()) == list(range(30))
    assert np.allclose(np.diff([due for _, due in asked]), 1 / 300)


def test_a_closed_loop_asks_again_when_it_is_answered() -> None:
    class Counting:
        running = most = 0

        async def predict(self, number: int) -> Answer:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.001)
            self.running -= 1
            return Answer(0.0, 0.0, 0.001, 200, content=number)

    client = Counting()
    answers = asyncio.run(closed_loop(client, 3, 0.2))  # type: ignore[arg-type]
    assert client.most == 3 and {0, 1, 2, 3, 4, 5} <= {answer.content for answer in answers}


def test_an_answer_of_two_versions_is_torn() -> None:
    first = {"version": 4, "classes": [{"class_id": "~0", "name": "a"}, {"class_id": "~1", "name": "b"}]}
    versions = churn.classes_by_version(first, [(6, "~0", None), (5, "~2", "c")])
    assert versions == {4: {"~0": "a", "~1": "b"}, 5: {"~0": "a", "~1": "b", "~2": "c"}, 6: {"~1": "b", "~2": "c"}}
    for version, inner, names, ids, torn in (
        (5, 5, ("c", "a"), ("~2", "~0"), False),
        (4, 4, ("c", "a"), ("~2", "~0"), True),  # not there yet
        (6, 6, ("b", "a"), ("~1", "~0"), True),  # gone
        (5, 5, ("b", "a"), ("~2", "~0"), True),  # another's name
        (5, 4, ("c", "a"), ("~2", "~0"), True),
        (7, 7, ("b", "c"), ("~1", "~2"), True),  # a version that no change made
        (5, 5, ("c",), ("~2",), True),  # too few
        (5, 5, ("c", "c"), ("~2", "~2"), True),
    ):
        assert churn.is_torn(2, (version, inner, names, ids), versions) is torn, (version, names)


def test_photographs_are_sent_to_a_clip_of_another_size() -> None:
    predicted = [SimpleNamespace(label=label) for label in "012"]
    larger: Any = SimpleNamespace(encoder=SimpleNamespace(image_size=224), explain=lambda images, top: predicted)
    queries = make_queries(larger, 3)
    sizes = [Image.open(io.BytesIO(image), formats=("JPEG",)).size for image in queries.bodies]
    assert sizes == [(500, 375)] * 3 and len(set(queries.bodies)) == 3 and queries.content_type == "image/jpeg"
    answer = {"predictions": [{"label": "2"}]}
    assert [queries.is_wrong(number, answer) for number in range(3)] == [True, True, False]
