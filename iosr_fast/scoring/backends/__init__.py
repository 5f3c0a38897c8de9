"""What sums affinities, one file a backend.

A backend is one function, which knows neither texts nor reducers (`lower` has computed those):

    affinity_sums(plan, queries, logits) -> path

    logits[b, c] += alpha * sum over keys j: weights[j] * exp(-beta * (1 - <queries[b], keys[j]>)) * values[j, c]

where without `values` a key has 1 at its class and 0 elsewhere. queries (B, D), B >= 1, and logits (B, C) float32 are
contiguous and on one device; logits are changed in place. `path` names the code that ran. Equal calls give equal bits.
"""
