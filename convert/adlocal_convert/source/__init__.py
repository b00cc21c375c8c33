"""Where a proxy comes from: a GGUF, a Hugging Face directory or the hub."""
