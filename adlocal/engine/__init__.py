"""Sequences under protection: the teacher and the pair in step."""
