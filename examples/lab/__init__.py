"""The laboratory: what protection costs a model, and what it costs a copy of it. See `python -m examples.lab`."""
