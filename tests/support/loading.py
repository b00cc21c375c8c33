"""Files that are loaded as a pair, whatever their own metadata say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adlocal.bundle import Bundle
from adlocal.pair import ProxyPair


def load_as(bundle: Bundle, first: Path, second: Path, params: Any) -> ProxyPair:
    """Two files as the pair of `bundle`."""
    return ProxyPair.load(
        first,
        second,
        format=bundle.format,
        epsilon=bundle.epsilon,
        delta_scale=bundle.delta_scale,
        params=params,
        bundle=bundle,
    )
