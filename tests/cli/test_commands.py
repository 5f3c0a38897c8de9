"""The commands of `iosr-fast`: what they refuse before any work, and what they print."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from iosr_fast import Classifier, cli
from iosr_fast.cli.embed import find_engine
from iosr_fast.exceptions import BadImageError
from iosr_fast.export import pretrained
from iosr_fast.files import work
from iosr_fast.store.bundle import Bundle
from iosr_fast.utils.command import ListCommand, new_app
from iosr_fast.utils.folders import new_folder
from iosr_fast.utils.manifest import write_manifest
from iosr_fast.utils.progress import progress
from tests import ROOT
from tests.cli.runs import never, refused, run
from tests.store.live_parts import engine_folder, pixel_clip, small_classifier


@pytest.fixture
def unfitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """A classifier on the CLIP that all classifiers open in these tests."""
    clip = pixel_clip(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(pretrained, "open_shared", lambda *_, **__: clip)
    return Classifier(method="tip-adapter", views=2)


def test_help_lists_every_command_without_importing_one() -> None:
    files = {path.stem.replace("_", "-") for path in Path(cli.__file__).parent.glob("[!_]*.py")}
    listed = {name for commands in cli.COMMANDS.values() for name in commands}
    assert listed == files - {"options"}
    code = """import sys
from typer.testing import CliRunner
from iosr_fast.cli import app
print(CliRunner().invoke(app, ["--help"]).output)
print(sorted({"numpy", "torch", "PIL", "msgspec", *(name for name in sys.modules if name[:14] == "iosr_fast.cli.")}
    & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    help, imported = done.stdout.rsplit("\n", 2)[:2]
    assert imported == "[]"
    for section, commands in cli.COMMANDS.items():
        assert f"{section}:\n" in help
        for name, line in commands.items():
            assert re.search(rf"^  {name} +{re.escape(line)}$", help, re.MULTILINE), name


def test_options_of_ray_have_a_section_of_their_own() -> None:
    sections = dict(
        re.findall(r"^(\w[\w ]*):\n(.*?)(?=^\w|\Z)", run("classify", "--help").output, re.MULTILINE | re.DOTALL)
    )
    assert re.findall(r"^  (--[\w-]+)", sections["Ray"], re.MULTILINE) == ["--ray", "--workers", "--gpus", "--address"]
    assert "--skip-bad" in sections["Options"] and "--help" in sections["Options"] and "IMAGES" in sections["Arguments"]


def test_help_and_completion_are_where_a_user_looks() -> None:
    assert run("-h").output == run("--help").output and run("fit", "-h").output == run("fit", "--help").output
    assert "--install-completion" in run("-h").output


def test_a_name_that_is_no_command_gets_a_suggestion() -> None:
    assert "Did you mean 'train-adapter'?" in refused("train_adapter")


def test_an_option_takes_several_words() -> None:
    seen: dict[str, list[str]] = {}

    def several(file: str, name: Annotated[list[str], typer.Option()], flag: bool = False) -> None:
        seen.update(file=[file], name=name)

    one = new_app()
    one.command(cls=ListCommand)(several)
    for words in (["f", "--name", "a", "b"], ["f", "--name", "a", "--name", "b"], ["f", "--name", "a", "b", "--flag"]):
        assert CliRunner().invoke(one, words).exit_code == 0
        assert seen.pop("name") == ["a", "b"] and seen.pop("file") == ["f"]
    refused_words = CliRunner().invoke(one, ["f", "--name"])
    assert refused_words.exit_code == 2 and "requires an argument" in refused_words.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool",
    ["build_engine", "evaluate", "train_adapter"],
)
def test_a_script_of_tools_is_the_command(tool: str, tmp_path: Path) -> None:
    name = tool.replace("_", "-")
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split()[1:3] == ["iosr-fast", name]
    from_here = run(name, "--help").output.replace("root", "iosr-fast", 1)
    assert "".join(done.stdout.split()) == "".join(from_here.split())


def test_fit_takes_no_toy_without_a_word(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    said = refused("fit", folder, "--out", tmp_path / "out")
    assert "for photographs try --model ViT-B-32 --pretrained laion2b_s34b_b79k" in said
    assert "near chance on photographs" in re.sub(r"\s+", " ", run("fit", "--help").output)


def test_a_place_that_can_not_be_written_is_named_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    monkeypatch.setattr(work, "load_bundle", never)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "an extension of a browser"}')
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
        "labels.txt": "to end in .csv or .parquet",
        "nowhere/labels.csv": "expected a folder to write",
        "file/labels.csv": "expected a folder to write",
        "mine": "holds other files than a run's parts",
    }.items():
        assert said in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / place)
    (tmp_path / "there.csv").write_text("mine")
    assert "exists already" in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / "there.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "got the folder" in refused("classify", tmp_path / "bundle", folder, "--out", tmp_path / "folder.csv")
    assert (tmp_path / "there.csv").read_text() == "mine" and (tmp_path / "mine" / "thesis.txt").exists()


def test_fit_replaces_a_classifier_only_if_it_is_asked_to(tmp_path: Path) -> None:
    with new_folder(tmp_path / "old") as made:
        write_manifest(made, "classifier", {})
    (tmp_path / "link").symlink_to("old")
    for place in ("old", "link"):
        fit = ("fit", tmp_path / "nowhere", "--model", "demo", "--out", tmp_path / place)
        assert "is a classifier already: --overwrite replaces it" in refused(*fit)
        assert "found no folder" in refused(*fit, "--overwrite"), "the place is taken, and the next mistake is named"
    (tmp_path / "old" / "notes.txt").write_text("mine")
    assert "other files than those of the classifier, 'notes.txt'" in refused(*fit, "--overwrite")


def test_options_and_folders_are_looked_at_before_a_clip_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    common = ("--model", "demo", "--out", tmp_path / "out")
    assert "found no folder" in refused("fit", tmp_path / "nowhere", *common)
    assert "found no folder" in refused("fit", folder / "class_0" / "0.png", *common)
    assert "found no folder" in refused("fit", folder, *common, "--unknown-images", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    none = refused("fit", folder, *common, "--unknown-images", tmp_path / "empty")
    assert "expected pictures of none of the classes in" in none
    assert "found 3 images in it and no sub-folder: move each" in refused("fit", folder / "class_0", *common)
    assert "expected a method of auto, zero-shot" in refused("fit", folder, *common, "--method", "magic")
    assert "did you mean 'tip-adapter'?" in refused("fit", folder, *common, "--method", "tip-adaptr")
    assert "leave alpha out" in refused("fit", folder, *common, "--alpha", "1")
    assert "views from 1 to 1000, got -1" in refused("fit", folder, *common, "--views", "-1")
    assert "key precision of fp32" in refused("fit", folder, *common, "--key-precision", "fp8")
    assert "expected templates with {}" in refused("fit", folder, *common, "--template", "a photo")


def test_classify_names_what_is_missing_before_the_bundle_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "load_bundle", never)
    (tmp_path / "empty").mkdir()
    said = refused("classify", "bundle", folder, tmp_path / "nowhere.png", tmp_path / "gone")
    assert "no such file or folder" in said and "nowhere.png" in said and "gone" in said
    assert "found none in" in refused("classify", "bundle", tmp_path / "empty")
    assert "expected --out, and no --joint, with --ray" in refused("classify", "bundle", folder, "--chunk", "2")
    assert "found none in" in refused("classify", "bundle", tmp_path / "empty", "--out", tmp_path / "labels.csv")
    assert "'--top': " in refused("classify", "bundle", folder, "--top", "-3")
    assert not (tmp_path / "labels.csv").exists()


def test_a_url_is_refused_as_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "open_shared", never)
    monkeypatch.setattr(work, "load_bundle", never)
    (tmp_path / "urls.csv").write_text("path,label\nhttps://a.org/b.jpg,x\nc.jpg,y\n")
    got = "expected a path, got the URL https://a.org/b.jpg: download it first"
    for place in ("https://a.org/b.jpg", tmp_path / "urls.csv"):
        assert got in refused("fit", place, "--model", "demo", "--out", tmp_path / "out")
    assert got in refused("classify", "bundle", "https://a.org/b.jpg")
    with pytest.raises(BadImageError, match=got):
        small_classifier().predict("https://a.org/b.jpg")


def test_an_unreadable_image_names_the_option_that_leaves_it_out(
    unfitted: Classifier, folder: Path, tmp_path: Path
) -> None:
    (folder / "class_0" / "bad.png").write_bytes(b"no picture")
    said = refused("fit", folder, "--model", "demo", "--out", tmp_path / "out", "--precision", "fp32")
    assert "bad.png" in said and "leave such images out by --skip-bad" in said


def test_embed_takes_the_engine_of_a_classifier(tmp_path: Path) -> None:
    small_classifier(engine_folder(tmp_path / "engine")).save(tmp_path / "saved")
    assert find_engine(str(tmp_path / "saved")) == tmp_path / "saved" / "engine"
    assert find_engine(str(tmp_path / "engine")) == tmp_path / "engine"


def test_a_folder_given_to_predict_is_called_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="it is a folder; use fit_folder, predict_folder"):
        small_classifier().predict(folder)
    with pytest.raises(ValueError, match="no such file"):
        small_classifier().predict(folder / "nowhere.png")


def test_nothing_read_is_no_success(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small_classifier(engine_folder(tmp_path / "engine"))
    monkeypatch.setattr(work, "load_bundle", lambda *_: Bundle.of(made._fit))
    monkeypatch.setattr(Bundle, "open", lambda *_: made._fit)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    said = refused("classify", "bundle", tmp_path / "bad.png", "--skip-bad", "--batch", "2", "--threads", "1")
    assert "none of the images could be read" in said
    done = run("classify", "bundle", tmp_path / "bad.png", folder, "--skip-bad", "--batch", "2", "--threads", "1")
    assert done.exit_code == 0 and "could not read 1 of 10 images" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-body-mb", "nan"), "expected --max-body-mb to be a number of MB, got nan"),
        (("--max-image-mb", "inf"), "expected --max-image-mb to be a number of MB, got inf"),
        (("--token-file", "nowhere"), "can't read the token in nowhere"),
        (("--token-file", "."), "can't read the token in ."),
        (("--port", "-1"), "expected port to be"),
    ],
)
def test_options_of_serve_are_called_by_name(words: tuple[str, ...], said: str) -> None:
    pytest.importorskip("fastapi", reason="fastapi comes with the serve extra")
    assert said in refused("serve", "bundle", *words)


@pytest.mark.parametrize("command", ["classify", "serve"])
def test_what_is_no_bundle_is_a_line(command: str, folder: Path, tmp_path: Path) -> None:
    more = {"classify": (folder,), "serve": ()}[command]
    engine_folder(tmp_path / "an-engine")
    (tmp_path / "empty").mkdir()
    for wrong in ("nowhere", "in/class_0/0.png", "empty", "an-engine"):
        said = refused(command, tmp_path / wrong, *more)
        assert said.startswith("iosr-fast: ") and len(said.strip().splitlines()) == 1, said


def test_fit_shows_what_it_does(
    unfitted: Classifier, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    unfitted.set_params(progress=True).fit_folder(folder)
    for verb in ("encode", "tune", "9/9"):
        assert verb in shown.getvalue()
    shown.truncate(0)
    unfitted.set_params(progress=False).fit_folder(folder)
    with progress("quiet", 3, shown=False) as advance:
        advance(1)
    assert "encode" not in shown.getvalue() and "quiet" not in shown.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    done = run("fit", folder, "--model", "demo", "--out", tmp_path / "out", "--views", "1", "--precision", "fp32")
    assert done.exit_code == 0 and "3 classes, 9 images, stack" in done.output, done.output
    (shares,) = re.findall(r"^shares of the logits: (.*)$", done.output, re.MULTILINE)
    assert f"shares of the logits: {shares}" in run("info", tmp_path / "out").output
    numbers = dict(re.findall(r"(texts|pictures|adapter) (\d+)%", shares))
    assert numbers and abs(sum(map(int, numbers.values())) - 100) <= 1


def test_quiet_shows_results_and_errors_alone(
    unfitted: Classifier, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "notes.txt").write_text("not an image")
    fit = ("fit", folder, "--model", "demo", "--precision", "fp32", "--out")
    done = run("--quiet", *fit, tmp_path / "out")
    assert (done.exit_code, done.output) == (0, ""), done.output
    caplog.set_level("INFO")
    loud = run("-v", *fit, tmp_path / "loud")
    first, second = loud.stdout.splitlines()[:2]
    assert re.fullmatch(r"\d+\.\d% of 9 left-out images right \(95%: \d+% to \d+%\).*", first)
    assert second.startswith(f"{tmp_path / 'loud'}: 3 classes, 9 images, stack")
    assert "reducer none, " in caplog.text and "reducer none, " not in loud.stdout
    assert "found no folder" in refused("--quiet", *fit[:1], tmp_path / "nowhere", *fit[2:], tmp_path / "other")


def test_fit_says_once_what_it_skips(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.txt").write_text("not an image")
    options = (
        "--model",
        "demo",
        "--method",
        "tip-adapter",
        "--alpha",
        "1",
        "--beta",
        "1",
        "--views",
        "1",
        "--precision",
        "fp32",
    )
    done = run("fit", folder, "--out", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert caplog.text.count("skipped 1 of") == 1
