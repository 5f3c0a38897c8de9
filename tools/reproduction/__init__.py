"""What tools/reproduce_paper.py runs: data sets as few-shot problems, stored embeddings, cells and tables of them."""
