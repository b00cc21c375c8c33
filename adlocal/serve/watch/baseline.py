"""The operator's benign traffic in a file: median and σ of each feature in each window, as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...files import written_whole
from .benign import Baseline, Benign
from .features import FEATURES, Figures

#: From fewer samples of a feature its default is kept.
LEAST_SAMPLES = 30
_NORMAL = 1.4826  # σ of a normal distribution over its MAD


def fit(samples: Mapping[int, Iterable[Figures]]) -> dict[int, dict[str, Benign]]:
    """Medians and σ = 1.4826 · MAD of benign figures, by window."""
    found: dict[int, dict[str, Benign]] = {}
    for window, many in samples.items():
        many = list(many)
        found[window] = {}
        for name in FEATURES:
            values = np.array([each[name] for each in many if name in each])
            if len(values) >= LEAST_SAMPLES:
                median = float(np.median(values))
                sigma = _NORMAL * float(np.median(np.abs(values - median)))
                found[window][name] = Benign(median, max(sigma, FEATURES[name].floor))
    return found


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes what `read_baseline` reads.

    Raises:
        AdlocalError: it cannot be written.
    """
    with written_whole(path) as partial:
        partial.write_text(as_toml(baseline), encoding="utf-8")


def as_toml(baseline: Baseline) -> str:
    """One table a window, one line a feature."""
    lines = ["# Benign traffic, from adlocal watch calibrate: the median of each feature by window, and 1.4826 MAD."]
    for window, features in baseline.items():
        lines.append(f'\n[windows."{window}"]')
        lines += [
            f"{name} = {{ median = {each.median:.6g}, sigma = {each.sigma:.6g} }}" for name, each in features.items()
        ]
    return "\n".join(lines) + "\n"


def read_baseline(path: Path) -> dict[int, dict[str, Benign]]:
    """Reads what `write_baseline` wrote.

    Raises:
        InputError: it is missing or no such file.
    """
    remedy = "write it with adlocal watch calibrate --out FILE.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["windows"]
        found = {
            int(window): {name: Benign(float(each["median"]), float(each["sigma"])) for name, each in features.items()}
            for window, features in tables.items()
        }
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not a baseline of the watch; {remedy}") from None
    unknown = {name for features in found.values() for name in features} - set(FEATURES)
    if unknown:
        raise InputError(f"{path}: {min(unknown)!r} is no feature of the watch; {remedy}")
    return found
