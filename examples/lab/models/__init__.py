"""Tiny models, and how they are trained."""
