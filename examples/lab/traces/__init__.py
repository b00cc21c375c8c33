"""Bundles, defences, and the traces that teachers write under them."""
