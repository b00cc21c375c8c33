"""From a direction to a bundle's files, and how faithful they are."""
