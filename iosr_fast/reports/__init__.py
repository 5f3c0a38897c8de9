"""Reports as HTML: one self-contained file each, without network, readable on a phone."""
