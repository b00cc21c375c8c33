"""What is known of llama.cpp: its files, its functions, its models, its tokens."""
