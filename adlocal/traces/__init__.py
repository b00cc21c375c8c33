"""Data in: traces and prompts, in the shapes that people have them, and as token ids."""

from .answers import check_answers, final_answer, join_answers
from .encoder import EncodedTrace, TraceEncoder, encode_all
from .messages import Message
from .prompts import Prompt, read_prompts
from .records import Record, read_records
from .remarks import remarks
from .trace import Trace, TraceFile, read_traces
from .writer import TraceWriter

__all__ = [
    "EncodedTrace",
    "Message",
    "Prompt",
    "Record",
    "Trace",
    "TraceEncoder",
    "TraceFile",
    "TraceWriter",
    "check_answers",
    "encode_all",
    "final_answer",
    "join_answers",
    "read_prompts",
    "read_records",
    "read_traces",
    "remarks",
]
