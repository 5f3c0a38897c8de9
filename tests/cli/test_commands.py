"""The commands of `iosr-fast`: what they refuse before any work, and what they print."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iosr_fast import Classifier, FewShotHead, cli
from iosr_fast.encoders.encoder import Embeddings
from iosr_fast.exceptions import BadImageError
from iosr_fast.export import pretrained
from iosr_fast.files import work
from iosr_fast.files.embedding_files import Part, encode_part
from iosr_fast.sealed.folders import new_folder
from iosr_fast.sealed.manifest import write_manifest
from iosr_fast.store.bundle import Bundle, load
from tests.cli.runs import Terminal, done, main, never, refused, run
from tests.full_disk import largest_file
from tests.store.live_parts import engine_folder, pixel_clip, small_classifier, text_embedding


@pytest.fixture
def fitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The words of a fit on a small CLIP."""
    clip = pixel_clip(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(pretrained, "open_shared", lambda *_, **__: clip)
    return "fit", tmp_path / "in", "--model", "demo", "--precision", "fp32", "--out", tmp_path / "out"


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    monkeypatch.setattr(work, "load", never)


def test_help_lists_every_command_without_importing_one() -> None:
    files = {path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert {name for commands in cli.COMMANDS.values() for name in commands} == files - {"options", "command"}
    code = """import sys
from typer.testing import CliRunner
from iosr_fast.cli import app
print(CliRunner().invoke(app, ["--help"]).output)
print(sorted({"numpy", "torch", "PIL", "msgspec", *(name for name in sys.modules if name[:14] == "iosr_fast.cli.")}
    & set(sys.modules) - {"iosr_fast.cli.command"}))"""
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    help, imported = listed.stdout.rsplit("\n", 2)[:2]
    assert imported == "[]" and "--install-completion" in help
    for section, commands in cli.COMMANDS.items():
        assert f"{section}:\n" in help
        for name, line in commands.items():
            assert re.search(rf"^  {name} +{re.escape(line)}$", help, re.MULTILINE), name


def test_help_has_sections_and_a_short_name() -> None:
    assert run("-h").output == run("--help").output and run("fit", "-h").output == run("fit", "--help").output
    shown = done("classify", "--help")
    sections = dict(re.findall(r"^(\w[\w ]*):\n(.*?)(?=^\w|\Z)", shown, re.MULTILINE | re.DOTALL))
    assert re.findall(r"^  (--[\w-]+)", sections["Ray"], re.MULTILINE) == ["--ray", "--workers", "--gpus", "--address"]
    assert "--skip-bad" in sections["Options"] and "--help" in sections["Options"] and "IMAGES" in sections["Arguments"]
    assert "Without --model it is photographs" in re.sub(r"\s+", " ", done("fit", "--help"))


def test_a_place_that_can_not_be_written_is_refused_before_the_work(
    folder: Path, tmp_path: Path, nothing_is_opened: None
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    for name, file in {"mine": "thesis.txt", "foreign": "manifest.json"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"name": "an extension of a browser"}')
    engine_folder(tmp_path / "an-engine")
    for place, said in {
        "file": "can't be listed as a folder (Not a directory)",
        "file/below": "got the file",
        "mine": "holds files that iosr_fast did not write",
        "foreign": "no complete classifier of iosr_fast",
        "an-engine": "to hold a classifier, got a engine",
    }.items():
        assert said in refused("fit", folder, "--model", "demo", "--out", tmp_path / place)
    for place, said in {
        "labels.txt": "to end in .csv, .parquet or .json",
        "nowhere/labels.csv": "expected a folder to write",
        "file/labels.csv": "expected a folder to write",
        "mine": "holds other files than a run's parts",
        "there.csv": "exists already",
        "folder.csv": "got the folder",
    }.items():
        assert said in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / place)
    assert (tmp_path / "there.csv").read_text() == "mine" and (tmp_path / "mine" / "thesis.txt").exists()


def test_a_disk_without_room_for_a_fit_is_told_and_nothing_stays(
    folder: Path, fitting: tuple[object, ...], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    for bytes_left in (100, 1500):  # none for the engine, some of the support images
        with largest_file(bytes_left):
            said = refused(*fitting, "--method", "tip-adapter", "--tune", "none")
        assert re.search(rf"for {tmp_path / 'out'}: [\d,]+ MB are free there", said)
        assert sorted(tmp_path.iterdir()) == before


def test_fit_replaces_a_classifier_only_with_overwrite(tmp_path: Path) -> None:
    with new_folder(tmp_path / "old") as made:
        write_manifest(made, "classifier", {})
    (tmp_path / "link").symlink_to("old")
    for place in ("old", "link"):
        fit = ("fit", tmp_path / "nowhere", "--model", "demo", "--out", tmp_path / place)
        assert "is a classifier already: --overwrite replaces it" in refused(*fit)
        assert "found no folder" in refused(*fit, "--overwrite"), "the place is taken, and the next mistake is named"
    (tmp_path / "old" / "notes.txt").write_text("mine")
    assert "other files than those of the classifier, 'notes.txt'" in refused(*fit, "--overwrite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fit", "nowhere"), "found no folder"),
        (("fit", "in/class_0/0.png"), "found no folder"),
        (("fit", "in", "--unknown-images", "empty"), "expected pictures of none of the classes in"),
        (("fit", "in", "--calibrate-on", "few.csv"), "has not seen, got 1"),
        (("fit", "in", "--calibrate-on", "urls.csv"), "got the URL"),
        (("fit", "few.csv", "--calibrate-on", "in"), "'class 1', 'class 2' are not among the"),
        (("fit", "in/class_0"), "found 3 images in it and no sub-folder: move each"),
        (("fit", "in", "--method", "tip-adaptr"), "did you mean 'tip-adapter'?"),
        (("fit", "in", "--alpha", "1"), "leave alpha out"),
        (("fit", "in", "--key-precision", "fp8"), "key precision of fp32"),
        (("fit", "in", "--template", "a photo"), "expected templates with {}"),
        (("fit", "in", "--descriptions", "texts.csv"), "got 'class_9'; did you mean 'class "),
        (("fit", "in", "--descriptions", "urls.csv"), "expected the columns class and text in urls.csv"),
        (("fit", "in", "--descriptions", "twice.json"), "a name is there twice among 'a', 'a'"),
        (("fit", "in", "--template", "none"), "expected descriptions of each class with templates=[]"),
        (("fit", "https://a.org/b.jpg"), "expected a path, got the URL https://a.org/b.jpg"),
        (("fit", "urls.csv"), "expected a path, got the URL https://a.org/b.jpg: download it first"),
        (("classify", "bundle", "in", "nowhere.png", "gone"), "expected files, found none at 'nowhere.png', 'gone'"),
        *(
            (words, "expected files, found none at 'gone.png'")
            for words in (
                ("fit", "gone.csv"),
                ("fit", "in", "--calibrate-on", "gone.csv"),
                ("classify", "bundle", "gone.csv"),
                ("embed", "--engine", "bundle", "--input", "gone.csv", "--out", "out"),
                ("evaluate", "in", "gone.csv"),
                ("suggest", "bundle", "gone.csv"),
            )
        ),
        (("fit", "in", "--label-column", "kind"), "CSV files alone with label_column='kind'"),
        (("fit", "in", "--keywords", "some"), "expected keywords (--keywords) tagged or all, of a folder"),
        (
            ("evaluate", "in", "few.csv", "--keywords", "all"),
            "expected keywords (--keywords) tagged or all, of a folder",
        ),
        (("evaluate", "in", "few.csv", "--label-column", "kind"), "expected the columns path and kind in few.csv"),
        (("classify", "bundle", "empty"), "found none in"),
        (("classify", "bundle", "https://a.org/b.jpg"), "expected a path, got the URL https://a.org/b.jpg"),
        (("train_adapter",), "Did you mean 'train-adapter'?"),
    ],
)
def test_mistakes_are_refused_before_a_clip_is_loaded(
    words: tuple[str, ...], said: str, folder: Path, nothing_is_opened: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    Path("few.csv").write_text("path,label\nin/class_0/0.png,class 0\n")
    rows = [f"{path},{path.parent.name.replace('_', ' ')}" for path in Path("in").rglob("*.png")]
    Path("gone.csv").write_text("\n".join(["path,label", *rows, "gone.png,class 0"]))
    Path("urls.csv").write_text("path,label\nhttps://a.org/b.jpg,x\nc.jpg,y\n")
    Path("texts.csv").write_text("class,text\nclass_9,round\n")
    Path("twice.json").write_text('{"a": ["round"], "a": ["red"]}')
    assert said in refused(*words, *(("--model", "demo", "--out", "out") if words[0] == "fit" else ()))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-body-mb", "nan"), "expected max_body_mb to be"),
        (("--token-file", "nowhere"), "can't read the token in nowhere"),
        (("--token-file", "."), "can't read the token in ."),
        (("--port", "-1"), "expected port to be"),
    ],
)
def test_options_of_serve_are_called_by_name(words: tuple[str, ...], said: str) -> None:
    assert said in refused("serve", "bundle", *words)


@pytest.mark.parametrize("command", ["classify", "serve"])
def test_a_folder_that_is_no_classifier_is_refused_in_a_line(command: str, folder: Path, tmp_path: Path) -> None:
    engine_folder(tmp_path / "an-engine")
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "in/class_0/0.png", "empty", "an-engine"):
        said = refused(command, tmp_path / wrong, *((folder,) if command == "classify" else ()))
        assert said.startswith("iosr-fast: ") and len(said.strip().splitlines()) == 1, said


def test_a_folder_given_to_predict_is_called_a_folder(folder: Path) -> None:
    for place, message in ((folder, "it is a folder; use fit_folder, predict_folder"), ("nowhere", "no such file")):
        with pytest.raises(BadImageError, match=message):
            small_classifier().predict(place)


def test_a_run_that_reads_no_image_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_classifier(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(work, "load", lambda *_: Bundle.of(made._fit))
    monkeypatch.setattr(Bundle, "open", lambda *_: made._fit)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    words = ("--skip-bad", "--batch", "2", "--threads", "1")
    assert "none of the images could be read" in refused("classify", "bundle", tmp_path / "bad.png", *words)
    both = run("classify", "bundle", tmp_path / "bad.png", folder, *words)
    assert both.exit_code == 0 and "could not read 1 of 10 images" in both.output
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    main("classify", "bundle", folder, *words)
    assert len(shown.getvalue().splitlines()) == 10


def test_descriptions_come_from_a_file(fitting: tuple[object, ...], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"class 0": ["round, red"], "class 1": ["small"], "class 2": ["=3"]}')
    (tmp_path / "t.csv").write_text('class,text\nclass 0,"round, red"\nclass 2,\'=3\n class 1 ,small\n')
    for name in ("t.json", "t.csv"):
        done(*fitting, "--template", "none", "--descriptions", tmp_path / name, "--overwrite")
        saved = load(tmp_path / "out")
        texts = [text_embedding(text) for text in ("round, red", "small", "=3")]
        np.testing.assert_allclose(saved.head.support.text, texts, atol=1e-6)
        assert saved.settings.templates == ()


@pytest.mark.usefixtures("folder")
def test_fit_warns_of_random_weights(fitting: tuple[object, ...], caplog: pytest.LogCaptureFixture) -> None:
    done(*fitting, "--pretrained", "none")
    assert caplog.text.count("the weights are random") == 1


def test_fit_shows_bars_on_a_terminal_and_its_result(
    fitting: tuple[object, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    for progress in (True, False):
        Classifier("demo", method="tip-adapter", progress=progress).fit_folder(folder)
        assert all((verb in shown.getvalue()) == progress for verb in ("encode", "tune", "9/9"))
        shown.truncate(0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    production = tmp_path / "production"
    for path in folder.rglob("*.png"):
        (production / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(production / path.parent.name / path.name)
    said = done(*fitting, "--calibrate-on", production)
    assert "3 classes, 9 images, stack" in said
    for text in (said, done("info", tmp_path / "out")):
        assert re.search(r"% of \d images of calibrate_on right \(95%: ", text)
    (shares,) = re.findall(r"^shares of the logits: (.*)$", said, re.MULTILINE)
    assert f"shares of the logits: {shares}" in done("info", tmp_path / "out")
    numbers = dict(re.findall(r"(texts|pictures|adapter) (\d+)%", shares))
    assert numbers and abs(sum(map(int, numbers.values())) - 100) <= 1


def test_quiet_shows_results_and_errors_alone(
    fitting: tuple[object, ...], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "notes.txt").write_text("not an image")
    assert run("--quiet", *fitting).output == "" and (tmp_path / "out").is_dir()
    caplog.clear()
    caplog.set_level("INFO")
    loud = done("-v", *fitting, "--overwrite")
    first, *others = loud.splitlines()
    assert re.fullmatch(r"\d+\.\d% of 9 left-out support images right \(95%: \d+% to \d+%\).*", first)
    assert any(line.startswith(f"{tmp_path / 'out'}: 3 classes, 9 images, stack") for line in others)
    assert "reducer none, " in caplog.text and "reducer none, " not in loud
    assert caplog.text.count("skipped 1 of") == 1
    (folder / "class_0" / "bad.png").write_bytes(b"no picture")
    assert "leave such images out by --skip-bad" in refused("--quiet", *fitting, "--overwrite")


def test_a_head_classifies_files_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng, names = np.random.default_rng(0), np.array(["ant", "bee", "cat"])
    centres = rng.standard_normal((3, 384))

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(n) % 3
        return (centres[ids] + rng.standard_normal((n, 384))).astype(np.float32), names[ids]

    (X, y), (rows, labels) = drawn(60), drawn(30)
    head = FewShotHead().fit(X, y)
    head.save("head")
    assert "384 numbers" in done("info", "head")
    expected = head.predict_proba(rows)
    keys = [f"http://a.org/{i}.jpg" for i in range(30)]
    rows[3] = np.nan
    Path("embedded").mkdir()
    part = Part(keys, Embeddings(rows), [None] * 3 + ["no picture"] + [None] * 26)
    Path("embedded/a").write_bytes(encode_part(part))
    write_manifest(Path("embedded"), "embeddings", {"parts": ["a"]})
    np.save("rows.npy", rows)
    np.savez("rows.npz", x=rows, keys=keys, y=labels)
    for place, named, reason in (("embedded", keys, "no picture"), ("rows.npy", [*map(str, range(30))], "finite")):
        assert "could not read 1 of 30" in run("classify", "head", place, "--skip-bad", "--out", f"{place}.csv").output
        table = list(csv.DictReader(io.StringIO(Path(f"{place}.csv").read_text())))
        assert [row["path"] for row in table] == named and reason in table[3]["error"]
        for row, best in zip(table[4:], expected[4:], strict=True):
            assert row["label"] == names[best.argmax()] and abs(float(row["probability"]) - best.max()) < 2e-4
    assert "can't read image 3" in refused("classify", "head", "rows.npy")
    words = ("--skip-bad", "--reject-unknown", "--max-error", "20%", "--joint", "--out", "all.csv")
    assert run("classify", "head", "rows.npz", *words[:4], "--out", "some.csv").output.count("of 29") == 2
    assert "classified together" in run("classify", "head", "rows.npy", *words[:2], *words[4:]).output
    said = done("evaluate", "head", "rows.npz", "--skip-bad", "--unknown", "rows.npy", "--json", "found.json")
    right = (names[expected.argmax(1)] == labels)[np.arange(30) != 3]
    assert f"{right.mean():.1%} of 29 images are right" in said and "29 images of no class" in said
    assert "60 images of 3 classes" in done("audit", "head")
    suggested = list(csv.DictReader(io.StringIO(run("suggest", "head", "rows.npz", "-n", "4", "--skip-bad").stdout)))
    assert len(suggested) == 4 and {row["path"] for row in suggested} < set(keys)


def test_what_a_head_can_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    FewShotHead("gda").fit(np.eye(6), [0, 0, 0, 1, 1, 1]).save("head")
    np.save("rows.npy", np.eye(6))
    np.save("wide.npy", np.eye(7))
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez("short.npz", x=np.eye(6), keys=["a"])
    np.savez("other.npz", x=np.eye(6), y=np.arange(6))
    Path("junk.npz").write_bytes(b"PK no zip")
    Path("rows.txt").write_text("1 2 3")
    for words, said in (
        (("classify", "head", "wide.npy"), "expected rows of 6 numbers in wide.npy, as the head takes"),
        (("classify", "head", "objects.npy"), "objects.npy is damaged, or of another form"),
        (("classify", "head", "junk.npz"), "junk.npz is damaged"),
        (("classify", "head", "short.npz"), "expected keys and y for each of the 6 rows"),
        (("classify", "head", "rows.txt"), "expected: a folder of `iosr-fast embed`"),
        (("classify", "head", "rows.npy", "--html", "page.html"), "'4' and 1 more: --html shows pictures"),
        (("suggest", "head", "rows.npy", "--html", "page.html"), "give embeddings whose keys are paths from here"),
        (("classify", "head", "rows.npy", "--runtime", "torch"), "a head has no encoder"),
        (("audit", "head", "--html", "page.html"), "head has none: give `paths` to FewShotHead.fit"),
        (("evaluate", "head", "rows.npy"), "expected labels y beside x in rows.npy"),
        (("evaluate", "head", "other.npz"), "the 2 classes of head ('0', '1'), got '2', '3', '4'"),
        (("serve", "head", "--log", "log.db"), "a head takes no changes"),
    ):
        assert said in refused(*words)
