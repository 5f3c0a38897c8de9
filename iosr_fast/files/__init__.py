"""Many files to labels or embeddings, in bounded memory and resumable.

Used by `Classifier.predict_folder`, `iosr-fast classify` and `iosr-fast embed`.
"""
