"""What is run: students, and the plans that name them."""
