"""Many files to labels or embeddings, in bounded memory and resumable.

Used by `Classifier.predict_folder`, `iosr-fast classify`, `iosr-fast embed` and tools/classify.py.
"""
