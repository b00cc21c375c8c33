"""`adlocal bench`: what protection costs, as ratios measured side by side in one run."""

from .command import run

__all__ = ["run"]
