"""`python -m benchmarks.claims NAME [DATA ...] --json FILE`: is what a classifier says of itself true?

audit       wrong labels that are named
automation  accuracy, probabilities and promises with one label a picture
labels      the same with several labels
suggest     what to label next
tree        promises on a tree
"""

import importlib
import sys

HOMES = {"audit": "audit", "automation": "promises", "labels": "promises", "suggest": "suggest", "tree": "promises"}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in HOMES:
        raise SystemExit(__doc__)
    module = importlib.import_module(f"benchmarks.claims.{HOMES[sys.argv[1]]}")
    next(claim for claim in module.CLAIMS if claim.name == sys.argv[1]).main(sys.argv[2:])
