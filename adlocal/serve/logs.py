"""The log: a line a record, JSON or for people, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def set_up(form: Literal["text", "json"], verbose: bool) -> None:
    """Makes adlocal.serve's loggers write to standard error.

    Args:
        form: of the lines.
        verbose: the engine's own log, too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSON() if form == "json" else _Text())
    logger = logging.getLogger("adlocal.serve")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


class _JSON(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = " ".join(
            f"{name}={value}" for name, value in _extra(record).items() if not isinstance(value, list | dict)
        )
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()} {told}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
