"""What are the class names' texts worth, and is `auto` better than scikit-learn's classifiers?

Accuracy on the test images. scikit-learn's classifiers see no texts; their parameters are chosen by cross-validation on
the support images, where a class has two.
"""

from benchmarks.claims.claim import Claim, Draws, Task, fit, rows_of
from iosr_fast.evaluation.rivals import RIVALS, fit_rival, rival_unavailable_reason, score_rival


def draws(task: Task, method: str, seed: int) -> Draws:
    if method not in RIVALS:
        support, text = task.support, None if method.endswith("no texts") else task.support.text
        head = fit(support.embeddings, support.labels, text, support.tau, method.removesuffix(", no texts"))
        yield {"accuracy": float((head.predict(rows_of(task.queries)) == task.labels).mean())}
    elif rival_unavailable_reason(method, task.support) is None:
        estimator, _ = fit_rival(method, task.support, seed)
        yield {"accuracy": score_rival(method, estimator, task.queries, task.labels)[0]}


METHODS = ("auto", "auto, no texts", "LogisticRegression", "LinearDiscriminantAnalysis", "zero-shot")
CLAIM = Claim("texts", __doc__, draws, METHODS)

if __name__ == "__main__":
    CLAIM.main()
