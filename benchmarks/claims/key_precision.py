"""What do int8 keys cost? `changed`: the share of test images that get another label than by float32 keys."""

from benchmarks.claims.claim import Claim, Draws, Task, fit
from iosr_fast import score


def draws(task: Task, method: str, seed: int) -> Draws:
    support = task.support
    plan = fit(support.embeddings, support.labels, support.text, support.tau, method).plan_
    in_int8 = plan if plan.keys is None else plan.with_key_precision("int8")
    exact, narrow = (score(one, task.queries).argmax(1) for one in (plan, in_int8))
    accuracy, of_narrow = (float((found == task.labels).mean()) for found in (exact, narrow))
    yield {"changed": float((narrow != exact).mean()), "accuracy": accuracy, "int8": of_narrow}


CLAIM = Claim("key-precision", __doc__, draws, ("auto", "tip-adapter", "proker"))

if __name__ == "__main__":
    CLAIM.main()
