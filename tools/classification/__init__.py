"""What is behind tools/classify.py, besides tools/embedding/, which lists the images, cuts and spreads the work."""
