"""Every exception that adlocal raises on purpose.

AdlocalError
├── InputError            the caller's input is unusable; nothing was computed
│   ├── ModelError        a GGUF is missing, unreadable, or of a kind that adlocal cannot run
│   ├── BundleError       a bundle is missing a half, its halves do not fit together, or it is of another format
│   ├── VocabularyError   teacher and proxy do not share a vocabulary
│   └── TraceError        a trace file cannot be read, or a trace has nothing to learn from
├── BusyError             too many requests wait already; nothing was done
├── ConversionError       the input was usable and the conversion or calibration failed: nothing was written
├── NativeError           the native library is missing or does not fit: nothing can be protected
└── ProxyError            a proxy could not be evaluated: no token was emitted
"""


class AdlocalError(Exception):
    """Base of adlocal's exceptions. The message names the value, what was expected, and the remedy."""

    #: What the `adlocal` command exits with.
    exit_status = 1


class InputError(AdlocalError):
    """The input cannot be used; the message says how to mend it."""

    exit_status = 2


class ModelError(InputError):
    """A GGUF is missing, unreadable, or of a kind that adlocal cannot run."""


class BundleError(InputError):
    """A bundle is incomplete, inconsistent, or written in a format that this version does not read."""


class VocabularyError(InputError):
    """Teacher and proxy number their tokens differently; the message names the first differing id."""


class TraceError(InputError):
    """A trace file or a trace in it cannot be used; the message names file and line."""


class BusyError(AdlocalError):
    """As many requests wait as may; the same one may be accepted later."""


class ConversionError(AdlocalError):
    """The conversion or calibration failed, or its result is not worth shipping. Nothing was written."""


class NativeError(AdlocalError):
    """The native library was not built, belongs to another adlocal or llama.cpp, or ran out of memory."""


class ProxyError(AdlocalError):
    """A proxy could not be evaluated, so protection cannot be computed. No token was emitted."""
