"""The paper's experiments: data sets as few-shot problems, stored embeddings, resumable cells and their tables."""
