"""A fitted classifier on embeddings at one version, and what it answers."""
