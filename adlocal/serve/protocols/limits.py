"""Bounds on what a client may send: within them, llama.cpp neither fails nor takes long to say no."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

#: llama.cpp counts tokens in 32 bits.
INT_MAX = 2**31 - 1
SEED_MAX = 2**32 - 1

#: Above it every sampler is a coin, and 999999 has brought llama.cpp down.
TEMPERATURE_MAX = 10.0
#: Near 0 a penalty divides logits to infinity.
REPEAT_PENALTY_MIN = 0.1
#: What penalties look back over is scanned for every token.
LOOKBACK_MAX = 32768

#: Each stop text is searched for in every token's text.
STOPS_MAX, STOP_LENGTH_MAX = 16, 256
#: Each answer is a request of its own.
N_MAX = 16
#: Templates take time quadratic in it.
MESSAGES_MAX = 4096
PARTS_MAX = 1024
PROMPTS_MAX = 64
TOOLS_MAX, TOOL_NAME_MAX, TOOL_CALLS_MAX = 128, 128, 128
NAME_MAX, DESCRIPTION_MAX = 256, 16384
LOGPROBS_MAX = 20
LOGIT_BIAS_MAX, BIAS_MAX = 1024, 100.0

#: A grammar is compiled in the engine's main thread, by recursion.
GRAMMAR_BYTES_MAX, GRAMMAR_DEPTH_MAX = 65536, 64
#: A schema becomes a grammar, in time that grows with all of these.
SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, SCHEMA_PROPERTIES_MAX = 65536, 32, 512
#: Each takes a level of the engine's stack.
REFERENCES_MAX = 128
#: llama.cpp writes `{m,n}` out, and refuses more than 2000 of anything.
REPEATS_MAX, REPEATS_SUM_MAX = 2000, 20000
PATTERN_LENGTH_MAX = 512
#: Alternatives are tried against every token of the vocabulary.
ENUM_MAX = 1024

Temperature = Annotated[float, Field(ge=0, le=TEMPERATURE_MAX)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Lookback = Annotated[int, Field(ge=-1, le=LOOKBACK_MAX)]
TopK = Annotated[int, Field(ge=-1, le=INT_MAX)]
Seed = Annotated[int, Field(ge=-1, le=SEED_MAX)]
Count = Annotated[int, Field(ge=1, le=N_MAX)]
#: -1 is llama-server's word for "not said".
MaxTokens = Annotated[int, Field(ge=-1, le=INT_MAX, json_schema_extra={"not": {"const": 0}})]
Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH_MAX)]
Stops = Annotated[list[Stop], Field(max_length=STOPS_MAX)]
Name = Annotated[str, Field(max_length=NAME_MAX)]
ToolName = Annotated[str, Field(min_length=1, max_length=TOOL_NAME_MAX, pattern=r"^[A-Za-z0-9_.:/-]+$")]
Description = Annotated[str, Field(max_length=DESCRIPTION_MAX)]
Token = Annotated[int, Field(ge=0, le=INT_MAX)]
