"""Antidistillation sampling (arXiv 2504.13146) for llama.cpp: text that serves the user and teaches a student badly."""

from .bundle import Bundle
from .bundle.calibration import Calibration
from .dose import Dose
from .engine.parallel import ParallelLlama
from .engine.scheduler import Scheduler
from .engine.sequences import Completion, Ended, Failed, Request, Sampled, Sampling
from .errors import (
    AdlocalError,
    BundleError,
    BusyError,
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
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AdlocalError",
    "AntidistillationLlama",
    "Bundle",
    "BundleError",
    "BusyError",
    "Calibration",
    "Completion",
    "ConversionError",
    "Dose",
    "Ended",
    "Failed",
    "InputError",
    "ModelError",
    "NativeError",
    "ParallelLlama",
    "ProxyError",
    "ProxyPair",
    "Request",
    "Sampled",
    "Sampling",
    "Scheduler",
    "Settings",
    "TraceError",
    "VocabularyError",
    "__version__",
]
