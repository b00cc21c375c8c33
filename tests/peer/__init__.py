"""llama.cpp's own tests of its server, run against the server that is under protection."""
