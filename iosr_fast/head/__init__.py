"""A fitted classifier on embeddings at one version, and what it answers.

`head.Head` is the data and what is computed from it, `predictions` are its answers to embeddings, `fitted.Fit` adds the
encoder and answers to images, `optimize` chooses the engine.
"""
