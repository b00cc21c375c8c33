"""Scaffolding that tests share."""
