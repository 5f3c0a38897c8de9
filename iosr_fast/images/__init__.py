"""Images to pixels: files, arrays and tensors to RGB, decoders, and the images of a folder."""
