"""The HTTP server of xllamacpp, which is llama-server's: what `adlocal engine` becomes, under the preloaded library.

It is run by its path, in a process of its own, and imports nothing of adlocal: the runtime would load
llama-cpp-python's llama.cpp beside the one that is to be protected.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

#: Holds the attributes of CommonParams as JSON. Every user of the machine could read an argument, and keys are there.
VARIABLE = "ADLOCAL_ENGINE"

#: Attributes whose value is a member of an enumeration of xllamacpp's by its name, or several.
_ENUMERATIONS = {
    "cache_type_k": "ggml_type",
    "cache_type_v": "ggml_type",
    "pooling_type": "llama_pooling_type",
    "flash_attn_type": "llama_flash_attn_type",
    "reasoning_format": "common_reasoning_format",
    "types": "common_speculative_type",
}
#: Bits of `sampling.user_sampling_config`: without its own, a value gives way to one in the model's metadata.
_CHOSEN = {"sampling.top_k": 1 << 1, "sampling.top_p": 1 << 2, "sampling.min_p": 1 << 3, "sampling.temp": 1 << 6}


def main() -> int:
    """Serves until SIGINT or SIGTERM, and returns the exit status."""
    values, before = json.loads(os.environ.pop(VARIABLE)), _descriptors()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # while a model is loaded Python would not come to its own handlers
    try:
        xllamacpp = importlib.import_module("xllamacpp")
        server = xllamacpp.Server(common_params(xllamacpp, values))
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"adlocal engine: the server did not start; llama.cpp's log says why ({error})", file=sys.stderr)
        return 1
    _serve(server.listening_address)
    _hang_up(_descriptors() - before)
    del server
    return 0


def common_params(xllamacpp: Any, values: Mapping[str, Any]) -> Any:
    """`CommonParams` with these values, by the paths of its attributes."""
    params = xllamacpp.CommonParams()
    for path, value in values.items():
        *owners, name = path.split(".")
        if name in _ENUMERATIONS:
            members = getattr(xllamacpp, _ENUMERATIONS[name])
            value = [members[each] for each in value] if isinstance(value, list) else members[value]
        elif name == "lora_adapters":
            value = [xllamacpp.CommonAdapterLoraInfo(file, scale) for file, scale in value]
        elif name == "fit_params_target":  # bytes beside those that it leaves free on each device
            value = [each + value for each in params.fit_params_target]
        setattr(functools.reduce(getattr, owners, params), name, value)
    params.sampling.user_sampling_config = sum(bit for path, bit in _CHOSEN.items() if path in values)
    return params


def _serve(address: str) -> None:
    """Says where, and waits for a signal. A second one ends the process at once."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        print(f"adlocal engine: listening on {address}", flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def _hang_up(descriptors: Iterable[int]) -> None:
    """Ends the connections among them: the server waits for requests that run, and those for their clients."""
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile, no socket, or one that listens
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.getpeername()
                    connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    sys.exit(main())
