"""A client that openapi-python-client generates works as it is."""

from __future__ import annotations

import os
import subprocess
from io import BytesIO
from pathlib import Path

import pytest

from tests import ROOT
from tests.serving import http_edge
from tests.serving.http_client import TOKEN, queries, serving

GENERATOR = ROOT / "build/client/bin/openapi-python-client"


@pytest.mark.slow
@pytest.mark.skipif(not os.access(GENERATOR, os.X_OK), reason="make develop did not install the generator")
def test_a_generated_client_predicts_and_changes_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with serving() as served, http_edge.site(served.app) as edge:
        address, folder = f"http://127.0.0.1:{edge.port}", tmp_path / "generated"
        command = [GENERATOR, "generate", "--url", f"{address}/openapi.json", "--meta", "none", "--output-path", folder]
        subprocess.run(command, check=True, timeout=60)
        from generated import AuthenticatedClient, Client, models, types
        from generated.api.changes import add_class, remove_example, rename_class
        from generated.api.classes import classes, picture
        from generated.api.predict import predict

        client, names = Client(address), served.served.classifier.predict([queries()[0], queries()[-1]]).tolist()
        changing = AuthenticatedClient(address, TOKEN)

        files = [types.File(BytesIO(queries()[i]), "x.png", "image/png") for i in (0, 0, -1, 1, 2)]
        two = {"body": models.PredictFilesBody(files[1:3]), "unknown": "reject"}
        for options, expected in (({"body": files[0]}, names[:1]), (two, names)):
            answer = predict.sync(client=client, **options)
            assert [each.top[0].label for each in answer.predictions] == expected
        assert [one.name for one in classes.sync(client=client).classes] == served.served.classifier.classes_.tolist()
        added = add_class.sync(client=changing, body=models.AddClassBody("new", images=files[3:]))
        for texts in ({"name": "newer", "keep_text": True}, {"parent": ["", "above"]}):
            rename_class.sync(added.class_id, client=changing, body=models.RenameClassBody(**texts))
        last = classes.sync(client=client).classes[-1].to_dict()
        assert last == {"class_id": added.class_id, "name": "newer", "examples": 2, "path": ["above"]}
        shown = picture.sync_detailed(added.example_ids[0], client=client)
        assert shown.content.startswith(b"RIFF") and shown.parsed is None, "of no type that it knows, and no error"
        gone = remove_example.sync(added.example_ids[0], client=changing)
        assert (gone.class_id, gone.version) == (added.class_id, 5)
