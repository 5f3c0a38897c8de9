"""The embedded demo: a small CLIP, an adapter for it and licensed pictures, so that all runs without a download."""
