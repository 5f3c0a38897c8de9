"""A client that openapi-python-client generates works as it is."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.serving import http_edge
from tests.serving.http_client import TOKEN, queries, serving

GENERATOR = ROOT / "build/client/bin/openapi-python-client"
needs_generator = pytest.mark.skipif(not os.access(GENERATOR, os.X_OK), reason="make develop installs the generator")


@pytest.mark.slow
@needs_generator
def test_a_generated_client_predicts_and_changes_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as served, http_edge.site(served.app) as edge:
        (tmp_path / "openapi.json").write_text(json.dumps(served.get("/openapi.json").json()))
        command = [GENERATOR, "generate", "--path", "openapi.json", "--meta", "none", "--output-path", "generated"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
        monkeypatch.syspath_prepend(tmp_path)
        made, models, types = (importlib.import_module(f"generated{part}") for part in ("", ".models", ".types"))
        options = {"base_url": f"http://127.0.0.1:{edge.port}", "raise_on_unexpected_status": True}
        client = made.Client(**options)

        def call(name: str, *given: Any, client: Any = client, **options: Any) -> Any:
            return importlib.import_module(f"generated.api.{name}").sync(*given, client=client, **options)

        def file(i: int) -> Any:
            return types.File(BytesIO(queries()[i]), f"{i}.png", "image/png")

        names = served.service.classifier.predict([queries()[0], queries()[-1]]).tolist()
        body = models.PredictFilesBody([file(0), file(-1)])
        for answer, expected in (
            (call("predict.predict", body=file(0)), names[:1]),
            (call("predict.predict", body=body, unknown="reject"), names),
        ):
            assert [one.top[0].label for one in answer.predictions] == expected
        assert call("predict.predict", body=file(0), keep=0.5).error.code == "invalid_parameters"
        listed = call("classes.classes").classes
        assert [one.name for one in listed] == served.service.classifier.classes_.tolist()
        first = call("classes.examples", listed[0].class_id).example_ids[0]
        with pytest.raises(importlib.import_module("generated.errors").UnexpectedStatus, match="200"):
            call("classes.picture", first)  # image/webp: it knows no such type, and must not read an error

        change = {"client": made.AuthenticatedClient(**options, token=TOKEN)}
        added = call("changes.add_class", body=models.AddClassBody("new", images=[file(0), file(1)]), **change)
        for texts in ({"name": "newer", "keep_text": True}, {"parent": ["", "above"]}):
            moved = call("changes.rename_class", added.class_id, body=models.RenameClassBody(**texts), **change)
            assert moved.class_id == added.class_id
        assert call("classes.classes").classes[-1].to_dict()["path"] == ["above"]
        gone = call("changes.remove_example", added.example_ids[0], **change)
        assert (gone.class_id, gone.example_ids, gone.version) == (added.class_id, added.example_ids[:1], 5)
