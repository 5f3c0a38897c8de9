"""Families of terms that a method's logits are made of: texts, keys, Gaussians and kernel ridge regression."""
