"""Experiments on real images: one script per finding, with its command and expected numbers."""
