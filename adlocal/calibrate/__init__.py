"""How strong? The search for the strength that spends a budget."""
