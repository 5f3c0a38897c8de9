"""Train an adapter, and measure the overlap that it reduces; data/ has the sources of pictures."""
