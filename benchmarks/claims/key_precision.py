"""What do keys in fewer bits cost? `changed`: the share of test images that get another label than by float32 keys."""

from benchmarks.claims.claim import Claim, Draws, Task, fit
from iosr_fast import score


def draws(task: Task, method: str, seed: int) -> Draws:
    support = task.support
    plan = fit(support.embeddings, support.labels, support.text, support.tau, method).plan_
    exact = score(plan, task.queries).argmax(1)
    for precision in ("fp16", "int8"):
        narrow = score(plan if plan.keys is None else plan.with_key_precision(precision), task.queries).argmax(1)
        accuracy, of_narrow = (float((found == task.labels).mean()) for found in (exact, narrow))
        changed = float((narrow != exact).mean())
        yield {"of": precision, "changed": changed, "accuracy": accuracy, "narrow": of_narrow}


CLAIM = Claim("key-precision", __doc__, draws, ("auto", "tip-adapter", "proker"))

if __name__ == "__main__":
    CLAIM.main()
