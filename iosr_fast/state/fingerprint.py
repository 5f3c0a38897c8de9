"""A state in one number: what a log begins from, and what tells whether two classifiers are the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from iosr_fast.state.state import State


def fingerprint(state: State) -> str:
    """SHA-256, in hex, over classes, support images and their pictures, method, parameters and reducer."""
    recipe, examples = state.recipe, state.examples
    facts = {
        "names": state.class_names,
        "uids": state.uids,
        "tau": state.tau,
        "numbers": [state.next_class, state.next_example],
        "recipe": [recipe.method, recipe.parameters, recipe.reducer_name, recipe.factor, recipe.key_precision],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    arrays = [state.text]
    if recipe.reducer is not None:
        arrays += [a for a in (recipe.reducer.shift, recipe.reducer.projection) if a is not None]
    arrays += [examples.owners, examples.ids]
    for rows in (examples.embeddings, examples.queries):
        arrays += [] if rows is None else [a for a in (rows.plain, rows.adapted) if a is not None]
    digest.update(b"".join(hashlib.sha256(picture or b"").digest() for picture in examples.pictures))
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
