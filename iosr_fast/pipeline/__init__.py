"""Files in, labels out: decoding, encoding and scoring of many images at once, in bounded memory.

`iosr_fast.Classifier.predict_folder` and the command `iosr-fast classify` stand on it.
"""
