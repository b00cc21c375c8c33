"""The two proxies at run time."""

from .proxy_pair import ProxyPair, context_params
from .state import PairState

__all__ = ["PairState", "ProxyPair", "context_params"]
