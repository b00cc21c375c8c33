"""Where keys, limits and budgets are kept: SQLite on one machine, Redis for several nodes."""

from .opening import default_directory, is_redis, open_store
from .protocol import UNLIMITED, Charge, Claim, KeyRecord, Kind, Level, Store, Taken

__all__ = [
    "UNLIMITED",
    "Charge",
    "Claim",
    "KeyRecord",
    "Kind",
    "Level",
    "Store",
    "Taken",
    "default_directory",
    "is_redis",
    "open_store",
]
