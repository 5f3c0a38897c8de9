"""Choosing parameters and methods on the support set or on a validation set."""
