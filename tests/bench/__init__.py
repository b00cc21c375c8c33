"""Benchmarks: tables of what was measured, run by hand."""
