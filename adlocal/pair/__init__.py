"""The two proxies at run time."""

from .analysis import Rows
from .parameters import context_params
from .proxy_pair import ProxyPair
from .state import PairState

__all__ = ["PairState", "ProxyPair", "Rows", "context_params"]
