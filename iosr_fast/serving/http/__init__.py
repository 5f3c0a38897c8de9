"""The HTTP server of a saved classifier: `iosr-fast serve BUNDLE`. Needs the `serve` extra."""
