"""The direction along which the proxies are perturbed."""
