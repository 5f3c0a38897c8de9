"""A fitted classifier on embeddings at one version, and what it answers.

`head.Head` is the data and what is computed from it, a `verdict.Verdict` what it decides about embeddings, which
`predictions` explain.
"""
