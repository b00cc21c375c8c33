"""The extraction watch: a score of each client against benign traffic, and the strength that follows from it."""

from .baseline import fit, read_baseline, write_baseline
from .calibration import read_observations, samples
from .logs import Log, RedisLog, SQLiteLog, open_log
from .observation import Level, Observation, Outcome
from .settings import AcrossKeys, Actions, Capacity, Ramp, WatchSettings, read_settings
from .watch import Row, Watch

__all__ = [
    "AcrossKeys",
    "Actions",
    "Capacity",
    "Level",
    "Log",
    "Observation",
    "Outcome",
    "Ramp",
    "RedisLog",
    "Row",
    "SQLiteLog",
    "Watch",
    "WatchSettings",
    "fit",
    "open_log",
    "read_baseline",
    "read_observations",
    "read_settings",
    "samples",
    "write_baseline",
]
