"""llama-server's own flags, as far as `adlocal engine` has them.

The `dest` of each is the path of an attribute of `xllamacpp.CommonParams`; what is not given keeps the default there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import count, seed, share, temperature

#: The servers that there are for it, the usual one first.
LLAMA_CPP_PYTHON = "llama-cpp-python"
ENGINES = ("xllamacpp", LLAMA_CPP_PYTHON)

#: Where the draft model's path goes.
DRAFT = "speculative.draft.mparams.path"

_Add = Callable[..., None]
_PREFIX = "params."
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_FLASH_ATTENTION = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}
_SPECULATIVE = ("draft-simple", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod")
_POOLING = ("mean", "cls", "last")
_REASONING = ("auto", "none", "deepseek", "deepseek-legacy")


def add_server(parser: argparse.ArgumentParser) -> None:
    """All of them, in groups. Its result has `flags` as well: a flag by the path of its attribute."""
    flags: dict[str, str] = {}
    for title, add_flags in {
        "model": _add_model,
        "context": _add_context,
        "network": _add_network,
        "requests": _add_requests,
        "drafts": _add_drafts,
    }.items():
        add_flags(_adder(parser.add_argument_group(f"{title}, as for llama-server"), flags))
    parser.set_defaults(flags=flags)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The values that were given, by the path of the attribute."""
    found = {name.removeprefix(_PREFIX): value for name, value in vars(args).items() if name.startswith(_PREFIX)}
    return {path: value for path, value in found.items() if value is not None}


def _adder(group: Any, flags: dict[str, str]) -> _Add:
    """Adds flags whose value goes to an attribute, and notes them."""

    def add(*names: str, to: str, **how: Any) -> None:
        group.add_argument(*names, dest=_PREFIX + to, **how)
        flags.setdefault(to, names[-1])

    return add


def _add_model(add: _Add) -> None:
    add("-m", "--model", to="model.path", required=True, metavar="TEACHER.gguf")
    add("-a", "--alias", to="model_alias", type=_listed, metavar="NAME,...", help="names of the model in the API")
    add(
        "--lora",
        to="lora_adapters",
        type=_adapters,
        action="extend",
        metavar="FILE,...",
        help="LoRA adapters of the teacher",
    )
    add("--lora-scaled", to="lora_adapters", type=_scaled, action="extend", metavar="FILE:SCALE,...")
    add("-ngl", "--gpu-layers", "--n-gpu-layers", to="n_gpu_layers", type=_layers, metavar="N|auto|all")
    add("-t", "--threads", to="cpuparams.n_threads", type=count, metavar="N")
    add(
        "-tb",
        "--threads-batch",
        to="cpuparams_batch.n_threads",
        type=count,
        metavar="N",
        help="for prompts; as -t by default",
    )
    add("--no-warmup", to="warmup", action="store_const", const=False)


def _add_context(add: _Add) -> None:
    add(
        "-c",
        "--ctx-size",
        to="n_ctx",
        type=_from_zero,
        metavar="N",
        help="tokens of context, of all requests together; 0 or none for the model's own",
    )
    add(
        "-np",
        "--parallel",
        to="n_parallel",
        type=count,
        metavar="N",
        help="requests that are answered at once; by default 4, which share the context",
    )
    add("-b", "--batch-size", to="n_batch", type=count, metavar="N")
    add("-ub", "--ubatch-size", to="n_ubatch", type=count, metavar="N")
    add("-kvu", "--kv-unified", to="kv_unified", action="store_const", const=True, help="share the context")
    add("-fa", "--flash-attn", to="flash_attn_type", type=_flash_attention, metavar="on|off|auto")
    add("-ctk", "--cache-type-k", to="cache_type_k", type=_cache_type, metavar="TYPE")
    add("-ctv", "--cache-type-v", to="cache_type_v", type=_cache_type, metavar="TYPE")
    add("-cram", "--cache-ram", to="cache_ram_mib", type=int, metavar="MiB", help="of idle prompts; 0 for none")
    add("--no-cache-prompt", to="cache_prompt", action="store_const", const=False)
    add(
        "--slot-save-path",
        to="slot_save_path",
        type=_directory,
        metavar="DIR",
        help="where requests to /slots save them",
    )


def _add_network(add: _Add) -> None:
    add(
        "--host",
        to="hostnames",
        type=_listed,
        metavar="ADDRESS,...",
        help="127.0.0.1 by default; a path that ends in .sock is a Unix socket",
    )
    add("--port", to="port", type=_port, metavar="N", help="8080 by default, 0 for a free one")
    add("--api-key", to="api_keys", type=_listed, action="extend", metavar="KEY,...", help="asked of requests")
    add(
        "--api-key-file",
        to="api_keys",
        type=_keys_in,
        action="extend",
        metavar="FILE",
        help="with a key a line; other users of the machine do not see it, as they see --api-key",
    )
    add("--api-prefix", to="api_prefix", metavar="PREFIX")
    add("--metrics", to="endpoint_metrics", action="store_const", const=True, help="answer /metrics")
    add("--no-slots", to="endpoint_slots", action="store_const", const=False, help="do not answer /slots")
    add("-lv", "--verbosity", to="verbosity", type=_from_zero, metavar="N", help="of llama.cpp's log; 0 is silent")


def _add_requests(add: _Add) -> None:
    add("-n", "--predict", "--n-predict", to="n_predict", type=count, metavar="N", help="most tokens of an answer")
    add("-s", "--seed", to="sampling.seed", type=seed, metavar="N")
    add("--temp", to="sampling.temp", type=temperature, metavar="T", help="where a request gives none")
    add("--top-k", to="sampling.top_k", type=_from_zero, metavar="N")
    add("--top-p", to="sampling.top_p", type=share, metavar="P")
    add("--min-p", to="sampling.min_p", type=share, metavar="P")
    add("--chat-template", to="chat_template", metavar="NAME|JINJA")
    add("--chat-template-file", to="chat_template", type=_text_of, metavar="FILE")
    add("--chat-template-kwargs", to="default_template_kwargs", type=_template_kwargs, metavar="JSON")
    add("--jinja", to="use_jinja", action="store_const", const=True, help="it is on by default")
    add("--no-jinja", to="use_jinja", action="store_const", const=False)
    add("--embeddings", to="embedding", action="store_const", const=True, help="answer /v1/embeddings as well")
    add("--pooling", to="pooling_type", type=_pooling, metavar="|".join(_POOLING), help="of embeddings")
    add("--no-prefill-assistant", to="prefill_assistant", action="store_const", const=False)
    add("--reasoning-format", to="reasoning_format", type=_reasoning, metavar="|".join(_REASONING))


def _add_drafts(add: _Add) -> None:
    add(
        "--spec-type",
        to="speculative.types",
        type=_speculative,
        metavar="TYPE,...",
        help=f"of speculative decoding: {', '.join(_SPECULATIVE)}",
    )
    add(
        "-md",
        "--model-draft",
        to=DRAFT,
        type=_file,
        metavar="FILE",
        help="for draft-simple: a small model of the teacher's vocabulary; its own text is never shown, nor protected",
    )
    add("--spec-draft-n-max", to="speculative.draft.n_max", type=count, metavar="N", help="tokens at once")
    add("--spec-draft-p-min", to="speculative.draft.p_min", type=share, metavar="P", help="of a token that is drafted")


def _listed(text: str) -> list[str]:
    found = [each.strip() for each in text.split(",") if each.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: give one or more, with commas between them")
    return found


def _from_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0 up")
    return int(text)


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text}: give a port, from 0 to {2**16 - 1}")
    return int(text)


def _layers(text: str) -> int:
    """llama-server's numbers: -1 is as many as fit, -2 is all."""
    if text in ("auto", "all"):
        return -1 if text == "auto" else -2
    return _from_zero(text)


def _adapters(text: str) -> list[tuple[str, float]]:
    return [(_file(name), 1.0) for name in _listed(text)]


def _scaled(text: str) -> list[tuple[str, float]]:
    parts = [each.rpartition(":") for each in _listed(text)]
    try:
        scales = [float(scale) if colon else float("nan") for _, colon, scale in parts]
    except ValueError:
        scales = [float("nan")]
    if any(map(math.isnan, scales)):
        raise argparse.ArgumentTypeError(f"{text}: give FILE:SCALE, with commas between several")
    return [(_file(name), scale) for (name, _, _), scale in zip(parts, scales, strict=True)]


def _one_of(text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text}: give one of {', '.join(known)}")
    return text


def _flash_attention(text: str) -> str:
    return f"LLAMA_FLASH_ATTN_TYPE_{_FLASH_ATTENTION[_one_of(text, tuple(_FLASH_ATTENTION))]}"


def _cache_type(text: str) -> str:
    return f"GGML_TYPE_{_one_of(text, _CACHE_TYPES).upper()}"


def _pooling(text: str) -> str:
    return f"LLAMA_POOLING_TYPE_{_one_of(text, _POOLING).upper()}"


def _reasoning(text: str) -> str:
    return f"COMMON_REASONING_FORMAT_{_one_of(text, _REASONING).upper().replace('-', '_')}"


def _speculative(text: str) -> list[str]:
    names = [_one_of(each, _SPECULATIVE) for each in _listed(text)]
    return [f"COMMON_SPECULATIVE_TYPE_{name.upper().replace('-', '_')}" for name in names]


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return os.path.abspath(text)


def _directory(text: str) -> str:
    """With the separator at its end, which llama.cpp puts no name behind without."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such directory")
    return os.path.join(os.path.abspath(text), "")


def _text_of(text: str) -> str:
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be read ({error})") from None


def _keys_in(text: str) -> list[str]:
    """A key a line; lines that begin with # are comments."""
    found = [line for line in _text_of(text).splitlines() if line and not line.startswith("#")]
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: there is no key in it; give one a line")
    return found


def _template_kwargs(text: str) -> dict[str, str]:
    """Each value as JSON, which is what llama.cpp keeps."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text}: give a JSON object")
    return {name: json.dumps(value) for name, value in found.items()}
