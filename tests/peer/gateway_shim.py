"""Stands where a llama-server is expected: translates its flags, and becomes `adlocal serve` before a real one.

Keys, pooling, addresses, contexts and names are the gateway's own; every other flag goes to the engine.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: Everything that the gateway lets policy decide.
ALLOWED = ("logprobs", "logit_bias", "grammar", "prefill", "embeddings")
#: With a value of the gateway's own.
_OURS = ("--host", "--port", "--api-key", "--ctx-size", "--parallel", "--alias", "--pooling")
_DROPPED = ("--hf-repo", "--hf-file", "--model", "--no-slots", "--slots", "--embedding")
_ALONE = ("--no-slots", "--slots", "--embedding")


def main() -> None:
    """Runs it."""
    ours, flags = divided(sys.argv[1:])
    made = Path(os.environ["GATEWAY_SUITE_MADE"])
    directory = Path(tempfile.mkdtemp(prefix="gateway-", dir=os.environ["GATEWAY_SUITE_TEMPORARY"]))
    (directory / "serve.toml").write_text(configuration(ours, flags), encoding="utf-8")
    state = os.environ["GATEWAY_SUITE_STATE"] if "--api-key" in ours else str(directory / "state")
    own = ["--config", str(directory / "serve.toml"), "--state", state]
    own += ["--engine", os.environ["GATEWAY_SUITE_ENGINE"], "--bundle", str(made / "bundle")]
    own += ["-m", str(made / "stand-in.gguf"), "--host", ours.get("--host", "127.0.0.1"), "--port", ours["--port"]]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    os.execve(sys.executable, [sys.executable, "-m", "adlocal", "serve", *own], variables)


def divided(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The gateway's flags with their values, and the engine's."""
    ours: dict[str, str] = {}
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if flag in (*_OURS, *_DROPPED):
            ours[flag] = "" if flag in _ALONE else rest.pop(0)
        else:
            flags.append(flag)
    return ours, flags


def configuration(ours: dict[str, str], flags: Sequence[str]) -> str:
    """A serve.toml that allows all that policy may."""
    n = int(ours.get("--parallel", 4))
    engine = [f"parallel = {n}", f"flags = {json.dumps(list(flags))}", "threads = 1"]
    engine += [f"ctx_size = {max(1, int(ours.get('--ctx-size', os.environ['GATEWAY_SUITE_N_CTX'])) // n)}"]
    if "--embedding" in ours:
        engine.append(f'pooling = "{ours.get("--pooling", "mean")}"')
    alias = [f"alias = {json.dumps(ours['--alias'])}"] if "--alias" in ours else []
    rules = [f"{name} = true" for name in ALLOWED]
    return "\n".join([*alias, "[engine]", *engine, "[policy.default]", *rules]) + "\n"


if __name__ == "__main__":
    main()
