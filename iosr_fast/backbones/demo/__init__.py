"""The embedded demo: a small CLIP, its adapter and licensed pictures, for use without a download."""
