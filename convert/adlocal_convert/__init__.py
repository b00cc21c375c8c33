"""The offline converter: a proxy student and traces in, a bundle out."""
