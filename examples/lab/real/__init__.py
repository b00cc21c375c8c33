"""The laboratory's question asked of real models."""
