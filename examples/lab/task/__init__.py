"""What is taught: word problems, and the words of a vocabulary."""
