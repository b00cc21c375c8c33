"""Antidistillation sampling (arXiv 2504.13146) for llama.cpp: text that serves the user and teaches a student badly."""

import importlib as _importlib
import typing as _typing

from .bundle import Bundle
from .bundle.calibration import Calibration
from .dose import Dose
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
from .llamacpp import installed as _installed
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

# What runs llama.cpp in this process is imported when it is first asked for: whoever starts an engine, or stands before
# one, needs no llama-cpp-python.
if _typing.TYPE_CHECKING:
    from .engine.parallel import ParallelLlama
    from .engine.scheduler import Scheduler
    from .engine.sequences import Completion, Ended, Failed, Request, Sampled, Sampling
    from .llama import AntidistillationLlama
    from .pair import ProxyPair
else:
    _MODULES = {
        "AntidistillationLlama": ".llama",
        "ParallelLlama": ".engine.parallel",
        "ProxyPair": ".pair",
        "Scheduler": ".engine.scheduler",
        **dict.fromkeys(("Completion", "Ended", "Failed", "Request", "Sampled", "Sampling"), ".engine.sequences"),
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with _installed.llama_cpp_python(f"adlocal.{name}", ImportError):
            module = _importlib.import_module(_MODULES[name], __name__)
        return globals().setdefault(name, getattr(module, name))

    def __dir__():
        return sorted({*globals(), *__all__})
