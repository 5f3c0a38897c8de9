"""Many files to labels or embeddings, in bounded memory and resumable.

Behind `Classifier.predict_folder`, `iosr-fast classify`, tools/embed.py and tools/classify.py.
"""
