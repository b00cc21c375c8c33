"""Antidistillation sampling (arXiv 2504.13146) for llama.cpp: text that serves the user and teaches a student badly."""

from .bundle import Bundle
from .bundle.calibration import Calibration
from .dose import Dose
from .engine.parallel import ParallelLlama
from .engine.sequences import Completion, Request, Sampling
from .errors import (
    AdlocalError,
    BundleError,
    ConversionError,
    InputError,
    ModelError,
    NativeError,
    ProxyError,
    TraceError,
    VocabularyError,
)
from .llama import AntidistillationLlama
from .pair import ProxyPair

__version__ = "0.1.0"

__all__ = [
    "AdlocalError",
    "AntidistillationLlama",
    "Bundle",
    "BundleError",
    "Calibration",
    "Completion",
    "ConversionError",
    "Dose",
    "InputError",
    "ModelError",
    "NativeError",
    "ParallelLlama",
    "ProxyError",
    "ProxyPair",
    "Request",
    "Sampling",
    "TraceError",
    "VocabularyError",
    "__version__",
]
