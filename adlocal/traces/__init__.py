"""Data in: traces and prompts, in the shapes that people have them, and as token ids."""

from .encoder import EncodedTrace, TraceEncoder, encode_all
from .trace import Message, Trace, TraceFile, read_traces

__all__ = ["EncodedTrace", "Message", "Trace", "TraceEncoder", "TraceFile", "encode_all", "read_traces"]
