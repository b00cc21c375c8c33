"""`adlocal plugin build`: the library of `adlocal run` for another llama.cpp."""

from __future__ import annotations

import argparse

from ..plugin import build, version_of


def run(args: argparse.Namespace) -> None:
    """Compiles it, and says where it is."""
    version = args.llama_version or version_of(args.libllama)
    path = build(args.include, version)
    print(f"{path}: for llama.cpp {version}; adlocal run finds it when --libllama names that llama.cpp")
