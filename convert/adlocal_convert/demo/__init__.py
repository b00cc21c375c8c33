"""What the demo converts."""
