# pyright: strict
"""A tour of the calls, on the demo's toy model, in types that mypy and pyright accept in their strict modes:

python -m tests.typed_script SUPPORT PHOTOS OUT    (folders: of class folders, of pictures, to write to)
"""

import sys
from pathlib import Path

import numpy as np

from iosr_fast import Classifier, FewShotHead, labelled_images
from iosr_fast.serving.batching import BatchingClassifier


def main(support: Path, photos: Path, out: Path) -> None:
    classifier = Classifier("demo", precision="fp32", tune="loo").fit_folder(support)
    tuned = classifier.tuned_
    print("not tuned" if tuned is None else tuned.summary(), classifier.method_, classifier.parameters_)

    paths, labels, *_ = labelled_images(support)
    classifier = Classifier("demo", runtime="auto", method="tip-adapter").fit(paths, labels)
    pictures = sorted(photos.iterdir())
    found: list[str | None] = classifier.predict(pictures, unknown="reject", keep=0.5).tolist()
    print([label.upper() for label in found if label is not None], classifier.unknown_.summary())
    print(classifier.predict_proba(pictures).max(), classifier.predict_sets(pictures, coverage=0.8))
    for one in classifier.explain(pictures, top=2, nearest=1):
        print(one.label or "none", [name.upper() for name, _ in one.pairs], [near.label for near in one.nearest])
    for suspect in classifier.audit().suspects:
        print(suspect.path or suspect.image, suspect.label, suspect.suggested, suspect.suspicion + suspect.probability)
    evaluation = classifier.evaluate(paths, labels)
    print(evaluation.summary(), 1 - evaluation.accuracy, [str(one.image) for one in evaluation.mistakes])
    for path, label, probability in classifier.predict_folder(photos, skip_bad=True):
        print(path.name, label.upper(), round(probability, 2))

    change = classifier.add_class("night", [np.zeros((32, 32, 3), np.uint8)])
    print(change.version, [one.name.upper() for one in classifier.classes()])
    classifier.save(out / "classifier")
    with BatchingClassifier(Classifier.load(out / "classifier")) as batching:
        print(batching.submit(pictures[0]).result())

    head = FewShotHead(method="gda", key_precision="fp16").fit(np.eye(8).repeat(4, 0), np.arange(8).repeat(4))
    head.save(out / "head")
    print(FewShotHead.load(out / "head").predict(np.eye(8)).tolist(), head.predict_proba(np.eye(8)).shape)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
