"""A tree over the classes: as callers and folders give it, through changes, bundles and logs, and in promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from typer.testing import CliRunner

from iosr_fast import Classifier, FewShotHead, labelled_images
from iosr_fast.cli import app
from iosr_fast.exceptions import IosrFastError
from iosr_fast.head.class_tree import DEEPEST, check_nodes, path_below, paths_of, read_parents
from iosr_fast.head.labelled_images import LabelledImages, called_as
from iosr_fast.methods.automation import PROMISES
from iosr_fast.methods.log_loss import sigmoid
from iosr_fast.methods.tree import Tree
from iosr_fast.scoring.reference import softmax
from iosr_fast.store.changes import RenameClass
from iosr_fast.store.description import describe, describe_log
from iosr_fast.store.head_files import fingerprint, head_from_bytes, head_to_bytes
from iosr_fast.store.log_reader import read_log
from tests.cli.runs import refused
from tests.conftest import unit_rows
from tests.store.live_parts import pictures, unfitted

CLASSES = ["siamese", "bengal", "pug", "fern"]
TREE = {"siamese": "cat", "bengal": "cat", "pug": "dog", "cat": "animal", "dog": "animal"}
PATHS = (("animal", "cat"), ("animal", "cat"), ("animal", "dog"), ())
IMAGES = pictures(np.random.default_rng(3), 4, 12)


def test_paths_of_any_depth(tmp_path: Path) -> None:
    given = tmp_path / "tree.csv"
    given.write_text("class,parent\n" + "".join(f"{name},{node}\n" for name, node in TREE.items()) + "fern,\n")
    assert paths_of(TREE, CLASSES) == paths_of(read_parents(given), CLASSES) == PATHS
    assert paths_of({np.str_(name): np.str_(node) for name, node in TREE.items()}, CLASSES) == PATHS
    assert paths_of(None, CLASSES) is paths_of({}, CLASSES) is paths_of({"fern": None}, CLASSES) is None
    given.write_text("class,parent\npug,dog\npug,cat\n")
    with pytest.raises(ValueError, match=r"one parent of 'pug' in .*tree.csv, got 'dog' and 'cat'"):
        read_parents(given)
    with pytest.raises(FileNotFoundError, match="expected a CSV file of class and parent, found no file"):
        read_parents(tmp_path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([("pug", "dog")], "expected tree as a mapping of classes and nodes to parents, got list"),
        ({"pug": 3}, r"in tree, got \('pug', 3\)"),
        ({0: "dog"}, r"expected names of classes and nodes in tree, got \(0, 'dog'\)"),
        ({"pug": "a", "a": "b", "b": "a"}, "expected a tree, got the node 'a' below itself"),
        ({"pug": "fern"}, "expected nodes as parents in tree, got 'fern': no class is below another"),
        ({"pug": "dog", "siamse": "cat"}, "got 'siamse'; did you mean 'siamese'"),
        ({"pug": "dog", "x": "y", "y": "x"}, "expected classes in tree and nodes above them, got 'x', 'y'"),
        ({"pug": "~3"}, "expected names of nodes, got '~3', which is how ids of classes look"),
        ({"pug": " dog"}, "expected names of nodes, got ' dog', which has blanks around it"),
        ({"pug": ""}, "expected names of nodes, got '', which is blank"),
        ({"pug": "f\u0435rn"}, "expected a node with a name of its own, got 'f.u0435rn', and 'fern' is another"),
        ({"pug": "dog", "fern": "d\u043eg"}, "got 'd.u043eg', and 'dog' is another node"),
        ({"pug": "n0"} | {f"n{i}": f"n{i + 1}" for i in range(10**5)}, f"at most {DEEPEST} nodes above a class"),
    ],
)
def test_what_is_no_tree_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unfitted(method="zero-shot").fit(class_names=CLASSES, tree=tree)


def test_what_can_have_no_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a tree of nested folders .* or of tree .*, got both"):
        unfitted().fit_folder(tmp_path, nested=True, tree=TREE)
    with pytest.raises(ValueError, match="several labels a picture take no tree"):
        unfitted().fit(IMAGES[0][:2], [{"pug"}, {"fern"}], CLASSES, tree=TREE)
    with pytest.raises(ValueError, match="expected a node at one place, got 'cat' below the root and animal"):
        check_nodes([("cat",), ("animal", "cat")], CLASSES[:2])
    with pytest.raises(ValueError, match="no node 'plant'; there are 'animal', 'cat', 'dog'"):
        path_below("plant", PATHS)
    with pytest.raises(ValueError, match="the name of a node or a path of names as the parent, got 3"):
        path_below(3, PATHS)  # type: ignore[arg-type]


def place(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[0][number]).save(folder / name)
    return folder


def test_nested_folders_are_a_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = "red/apple/royal_gala/1.png", "red/apple/other/1.png", "red/pear/other/1.png", "plum/1.png", "red/fig/1.png"
    folder = place(tmp_path / "support", *names)
    (tmp_path / "more.csv").write_text("path,label\nsupport/red/fig/1.png,kiwi\nsupport/plum/1.png,pear/other\n")
    given = labelled_images(folder, nested=True)
    assert given.class_names == ["apple/other", "fig", "pear/other", "plum", "royal gala"]
    nodes = {"apple": "red", "pear": "red", "apple/other": "apple", "pear/other": "pear", "royal gala": "apple"}
    assert given.tree == nodes | {"fig": "red"}
    assert "folders of one name are called by their paths: 'apple/other', 'pear/other'" in caplog.text
    corrected = labelled_images(folder, tmp_path / "more.csv", nested=True)
    assert corrected.class_names == ["apple/other", "kiwi", "pear/other", "royal gala"] and corrected.tree == nodes
    caplog.clear()
    flat = labelled_images(folder)
    assert flat.class_names == ["plum", "red"] and flat.tree == {}
    assert "2 classes, the folders in it; 4 folders of images below these are not told apart: --nested" in caplog.text
    caplog.clear()
    assert labelled_images(place(tmp_path / "one", "a/photos/1.png", "b/2.png")).tree == {} and not caplog.text
    in_table = LabelledImages([], ["pear/other"], ["pear/other"], [], {})  # and no folder
    assert called_as(in_table, ["other", "pear/other"], [(), ("pear",)]) == in_table
    alone = labelled_images(place(tmp_path / "two", "all/a/1.png", "all/b/2.png"), nested=True)
    assert alone.tree == {"a": "all", "b": "all"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/b/1.png", "a/2.png", "c/3.png"], "class folders in .*a, found both, 1 images and the folders b"),
        (["train/a/1.png", "train/b/2.png", "test/a/3.png"], "which hold class folders themselves .*: give .*train$"),
        (["a/b/1.png"], "at least two class folders"),
        (["a/b/train/1.png", "a/b/test/2.png", "a/train/3.png"], "class folders in .*a/b, got the splits test, train"),
        (["a/b/1.png", "a/c/1.txt"], r"expected images in the class folder .*a/c, found none"),
    ],
)
def test_folders_that_are_no_tree_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        labelled_images(tmp_path, nested=True)


@pytest.mark.parametrize("command", [("optimize", "none", "--images"), ("train-adapter", "--out", "a", "--data")])
def test_other_commands_read_nested_folders_too(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = place(tmp_path / "support", "a/b/1.png", "a/2.png", "c/3.png")
    assert "found both, 1 images and the folders b" in refused(*command, folder, "--nested")


def fitted(tree: Any = TREE) -> Classifier:
    named = [CLASSES[c] for c in IMAGES[1]]
    return unfitted(method="gda", look_alikes=False).fit(IMAGES[0], named, CLASSES, tree=tree)


def paths(classifier: Classifier) -> dict[str, tuple[str, ...]]:
    return {one.name: one.path for one in classifier.classes()}


def test_changes_keep_the_tree_and_a_log_makes_them_again(tmp_path: Path) -> None:
    classifier, new = fitted(), pictures(np.random.default_rng(4), 6, 2)[0]
    classifier.open_log(log := tmp_path / "changes.db")
    assert classifier.snapshot().judged.odds.shape == (48, 3)
    assert classifier.move_class("fern", ["plant", "fir"]).class_id == "~3"
    head = classifier.snapshot()
    assert head.computed("out_of_fold") is not None and head.computed("judged") is None
    assert head.judged.odds.shape == (48, 3) and head.tree.inner[-1] == ("plant", "fir")
    classifier.add_class("moss", new[-2:], parent="plant")
    classifier.rename_class("pug", "beagle", keep_text=True)
    classifier.remove_class("siamese")
    classifier.add_class("ivy", new[-4:-2])
    for message, call in {
        "no node 'fruit'; there are 'animal', 'cat'": lambda: classifier.add_class("fig", b"no image", parent="fruit"),
        "no node 'siamese'": lambda: classifier.move_class("ivy", "siamese"),
        "at one place, got 'cat' below animal and plant": lambda: classifier.move_class("ivy", ["plant", "cat"]),
        "got 'dog', and 'dog' is another node or a class": lambda: classifier.rename_class("ivy", "dog"),
        "got 'ivy', and 'ivy' is another": lambda: classifier.move_class("beagle", ["ivy"]),
        "no class 'fig'": lambda: classifier.move_class("fig", None),
        "got 'plant', and 'plant'": lambda: classifier.add_class("plant", b"no image"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    expected = {"bengal": ("animal", "cat"), "beagle": ("animal", "dog"), "fern": ("plant", "fir"), "moss": ("plant",)}
    assert paths(classifier) == expected | {"ivy": ()} and classifier.version == 6
    assert [one.path for one in read_log(log)] == [("plant", "fir"), ("plant",), (), (), ()]
    assert "move_class ~3 below 'plant > fir'" in "\n".join(describe_log(log))
    classifier.close_log()
    again = fitted()
    again.open_log(log)
    assert paths(again) == paths(classifier) and fingerprint(again.snapshot()) == fingerprint(classifier.snapshot())
    again.close_log()
    with pytest.raises(IosrFastError, match="is the log of another state"):
        fitted(None).open_log(log)
    for name in paths(again):
        again.move_class(name, ())
    assert again.snapshot().paths is None and {*paths(again).values()} == {()}


def test_bundles_have_the_tree_and_without_one_nothing_of_it(tmp_path: Path) -> None:
    plain, head = fitted(None).snapshot(), fitted().snapshot()
    assert b"path" not in RenameClass.of(1, "x").encode(plain)
    assert fingerprint(plain) == fingerprint(replace(head, paths=None)) != fingerprint(head)
    assert head_from_bytes(head_to_bytes(head)).paths == PATHS
    for name, tree in {"plain": None, "tree": {"0": "even", "2": "even", "1": "odd"}}.items():
        made = FewShotHead("gda", look_alikes=False).fit(*ROWS, tree=tree).save(tmp_path / name)
        written = json.loads((tmp_path / name / "manifest.json").read_bytes())
        assert ("paths" in written) == (tree is not None), made
    saved = FewShotHead.load(tmp_path / "tree")
    given = saved.predict(ROWS[0], max_error=0.1)
    assert {type(label) for label in given if label is not None} <= {int, str} and "even" in saved.snapshot().node_names
    assert "tree: 1 level above the classes, 2 nodes" in describe(tmp_path / "tree")
    assert "tree" not in describe(tmp_path / "plain").replace(str(tmp_path), "")


def rows(rng: np.random.Generator, means: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows around the means of classes, which lie around those of pairs."""
    labels = np.repeat(np.arange(len(means)), each)
    return means[labels] + 1.2 * rng.standard_normal((len(labels), means.shape[1])) / means.shape[1] ** 0.5, labels


def pairs(rng: np.random.Generator, classes: int = 8) -> np.ndarray:
    return np.repeat(unit_rows(rng, classes // 2, 32), 2, axis=0) + 0.5 * unit_rows(rng, classes, 32)


DRAWS = 40
ROWS = rows(np.random.default_rng(7), pairs(np.random.default_rng(7), 4), 30)
PAIRS = {str(c): f"pair {c // 2}" for c in range(6)}  # of classes 6 and 7, directly below the root, there is none


@pytest.mark.slow
def test_of_all_answers_no_more_are_wrong_than_promised() -> None:
    broken, flat, deep, coarse = 0, 0.0, 0.0, 0.0
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        means = pairs(rng)
        support, (new, labels) = rows(rng, means, 30), rows(rng, means, 100)
        head = FewShotHead("gda", look_alikes=False).fit(*support, tree=PAIRS)
        given = head.predict(new, max_error=0.05)
        answered = given != np.array(None)
        wrong = [answer not in (c, PAIRS.get(str(c))) for answer, c in zip(given, labels.tolist(), strict=True)]
        n_wrong = int(np.array(wrong)[answered].sum())
        broken += n_wrong > 0 and binom.sf(n_wrong - 1, answered.sum(), 0.05) < 0.05
        curve, at = head.automation(), PROMISES.index(0.05)
        assert curve.shares[at] == pytest.approx(curve.level_shares[at].sum())
        titles = str(curve).split("\n")[1]
        assert titles == "promised errors  least probability   level 0  wrong   level 1  wrong  accepted  wrong"
        deep += np.isin(given, [*range(8)]).mean() / DRAWS
        coarse += answered.mean() / DRAWS
        head._fit = replace(head._fit, head=replace(head.snapshot(), paths=None))
        flat += (head.predict(new, max_error=0.05) != np.array(None)).mean() / DRAWS
    assert broken <= binom.ppf(0.95, DRAWS, 0.05) and coarse > flat + 0.1 and coarse > deep > 0.1, (broken, deep, flat)


def test_a_tree_of_which_no_node_says_anything_promises_as_none() -> None:
    above_all = FewShotHead("gda").fit(*ROWS, tree={c: "number" for c in range(4)})  # labels as they are
    plain = FewShotHead("gda").fit(*ROWS)
    assert str(above_all.automation()) == str(plain.automation())
    given = [one.predict(ROWS[0], max_error=0.1).tolist() for one in (above_all, plain)]
    assert given[0] == given[1] and None in given[0]
    with pytest.raises(ValueError, match="each class once in tree, got one as text and as its label"):
        FewShotHead("gda").fit(*ROWS, tree={0: "number", "0": "number"})
    nearly_equal = np.array([[0.0, 1e-30]])
    assert Tree(((), ())).of_logits(nearly_equal)[1][0] == nearly_equal.argmax(1)


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_is_the_deepest_node_that_reaches_more_than_half(seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = [()]
    for number in range(7):
        at.append((*at[rng.integers(len(at))], f"node {number}"))
    tree = Tree(tuple(at[rng.integers(8)] for _ in range(rng.integers(2, 12))))
    logits = 3.0 * rng.standard_normal((50, len(tree.paths)))
    below = [{c} for c in range(len(tree.paths))]
    below += [{c for c, path in enumerate(tree.paths) if path[: len(node)] == node} for node in tree.inner]
    depths = [*[99] * len(tree.paths), *map(len, tree.inner)]
    masses = np.array([softmax(logits)[:, sorted(classes)].sum(1) for classes in below]).T
    odds, nodes = tree.of_logits(logits)
    np.testing.assert_allclose(sigmoid(odds), np.take_along_axis(masses, nodes, 1), atol=1e-9)
    for least in (0.51, 0.8, 0.99):
        nodes, answered = tree.answer(logits, float(np.log(least / (1 - least))))
        for node, one, row in zip(nodes.tolist(), answered.tolist(), masses >= least, strict=True):
            reaching = np.flatnonzero(row).tolist()
            assert one == bool(reaching)
            assert not one or node == min(reaching, key=lambda n: (len(below[n]), -depths[n]))


def test_a_node_has_the_probability_of_its_classes(tmp_path: Path) -> None:
    new = pictures(np.random.default_rng(8), 4, 6)[0].reshape(2, 2, 6, 8, 8, 3)
    new = np.concatenate([*new[0], (new[0] / 2 + new[0, ::-1] / 2).astype(np.uint8)[0]])  # the last ones of two cats
    classifier = fitted()
    integers = unfitted(method="gda", look_alikes=False).fit(
        *IMAGES, CLASSES, tree={CLASSES.index(one) if one in CLASSES else one: above for one, above in TREE.items()}
    )
    given, explained = classifier.predict(new, max_error=0.1), classifier.explain(new, top=4, max_error=0.1)
    assert {*given} == {"siamese", "bengal", "cat"}, given
    assert [CLASSES[c] if isinstance(c, int) else c for c in integers.predict(new, max_error=0.1)] == given.tolist()
    for answer, one in zip(given, explained, strict=True):
        assert answer in (None, one.label)
        below = [each.probability for each in one.top if one.label in (each.label, *PATHS[CLASSES.index(each.label)])]
        assert one.probability == pytest.approx(sum(below))
    explained = classifier.explain(new, unknown="reject", keep=0.5, max_error=0.1)
    assert {(one.label, one.path) for one in explained if one.unknown.rejected} == {(None, ())}
    with pytest.raises(ValueError, match="a label for unknown pictures that no class has, got 'cat'"):
        classifier.predict_folder(tmp_path, unknown="reject", unknown_label="cat")


def test_folders_are_fitted_with_a_tree(tmp_path: Path) -> None:
    names = [f"{node}/{name}/1.png" for name, node in (("pug", "dog"), ("bengal", "cat"), ("other", "cat"))]
    folder, out = place(tmp_path / "support", *names, "dog/other/1.png", "fern/1.png"), tmp_path / "out"
    given = ["fit", str(folder), "--model", "demo", "--out", str(out), "--method", "zero-shot", "--precision", "fp32"]
    done = CliRunner().invoke(app, [*given, "--nested"])
    assert done.exit_code == 0 and "5 classes, 5 images" in done.stdout, done.output
    assert "tree: 1 level above the classes, 2 nodes" in done.stdout
    both = CliRunner().invoke(app, [*given, "--overwrite", "--nested", "--tree", str(tmp_path / "tree.csv")])
    assert both.exit_code == 2 and "or of tree (--tree), got both" in both.output
    (tmp_path / "tree.csv").write_text("class,parent\ndog,pet\ncat,pet\n")
    classifier = unfitted(method="zero-shot").fit_folder(folder, tree=tmp_path / "tree.csv")
    assert paths(classifier) == {"cat": ("pet",), "dog": ("pet",), "fern": ()}
    classifier.fit_folder(folder, nested=True)
    new = place(tmp_path / "new", "dog/other/2.png", "fern/3.png")  # where "other" is one folder
    with pytest.raises(ValueError, match="expected at least 9 images of calibrate_on"):  # its labels are right
        classifier.fit_folder(folder, nested=True, calibrate_on=new)
    others = {"cat/other": ("cat",), "dog/other": ("dog",)}
    assert paths(classifier) == {"bengal": ("cat",), "pug": ("dog",), "fern": ()} | others
    done = CliRunner().invoke(app, ["evaluate", str(out), str(new), "--nested"])
    assert done.exit_code == 0 and "of 2 images are right" in done.output, done.output
    done = CliRunner().invoke(app, ["evaluate", str(out), str(place(new, "other/1.png")), "--nested"])
    assert done.exit_code == 2 and "got 'other': rename" in done.output, done.output
