"""The proxy in PyTorch, differentiated at the weights of its GGUF."""
