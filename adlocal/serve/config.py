"""The configuration of `adlocal serve`: TOML, with the policy in it. An unknown key is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ..bundle import Bundle
from ..errors import InputError
from ..settings import Settings, resolve
from .policy import Policy, Strict
from .state import default_directory, is_redis

XLLAMACPP = "xllamacpp"
_Seconds = Annotated[float, Field(gt=0, le=86400)]
_Count = Annotated[int, Field(ge=1)]


class Listen(Strict):
    """Where clients come in.

    Attributes:
        host: an address of this machine alone, unless there are keys.
        port: 0 for a free one.
        tls_cert: PEM file of the certificate, for HTTPS; with `tls_key`.
        tls_key: PEM file of its private key.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    tls_cert: Path | None = None
    tls_key: Path | None = None


class Engine(Strict):
    """The server behind the gateway.

    Attributes:
        program: "xllamacpp", or the path of a llama-server.
        parallel: answers that are generated at once.
        ctx_size: tokens of context of each; by default the model's own are divided among them.
        threads: as llama-server's -t.
        gpu_layers: as llama-server's -ngl.
        pooling: of embeddings, for whom policy allows them. Of means, llama.cpp aborts where there are several slots.
        flags: others of the engine, as `adlocal engine --help` or llama-server's own has them.
        start_seconds: how long it may take to load the model.
        stall_seconds: how long a batch may take before the gateway calls itself ill.
    """

    program: str = XLLAMACPP
    parallel: Annotated[int, Field(ge=1, le=256)] = 4
    ctx_size: _Count | None = None
    threads: _Count | None = None
    gpu_layers: str | int | None = None
    pooling: Literal["cls", "last"] | None = None
    flags: tuple[str, ...] = ()
    start_seconds: _Seconds = 600
    stall_seconds: _Seconds = 120


class Limits(Strict):
    """What all requests are held to.

    Attributes:
        body_bytes: of a request.
        queue: answers that wait for a slot, of all keys.
        queue_per_key: answers that wait for a slot, of one key.
        queue_seconds: how long one waits at most.
        body_seconds: how long a body may take to arrive.
        total_seconds: how long an answer may take.
        stall_seconds: how long a client may leave what is sent to it unread.
        ping_seconds: after so long without a word, a stream gets a comment, so that proxies keep it open.
    """

    body_bytes: _Count = 2 * 2**20
    queue: _Count = 64
    queue_per_key: _Count = 16
    queue_seconds: _Seconds = 60
    body_seconds: _Seconds = 30
    total_seconds: _Seconds = 900
    stall_seconds: _Seconds = 30
    ping_seconds: _Seconds = 10


class Tags(Strict):
    """What stands around reasoning, where the template does not tell.

    Attributes:
        open: begins it.
        close: ends it.
    """

    open: str
    close: str


class Config(Strict):
    """All of serve.toml.

    Attributes:
        model: the teacher, a GGUF.
        bundle: of `adlocal convert`.
        alias: the model's name for clients; by default what the file says.
        state: a directory, or redis://... where several nodes share keys, limits and the watch.
        pepper: file of the secret that keys are hashed with; by default in the state's directory.
        keys: whether requests need a key; by default if there are any.
        reasoning_tags: around reasoning; by default what the model's template says.
        log_text: write prompts and answers into the log.
        log_format: of the log on standard error.
        watch: settings of the extraction watch.
    """

    model: Path | None = None
    bundle: Path | None = None
    alias: str | None = None
    state: str | None = None
    pepper: Path | None = None
    keys: bool | None = None
    reasoning_tags: Tags | None = None
    log_text: bool = False
    log_format: Literal["text", "json"] = "json"
    listen: Listen = Listen()
    engine: Engine = Engine()
    limits: Limits = Limits()
    policy: Policy = Policy()
    watch: dict[str, Any] = Field(default_factory=dict)


def read(path: Path) -> Config:
    """Reads a file. Relative paths in it are relative to its directory.

    Raises:
        InputError: it cannot be read, is no TOML, or says something that nobody knows.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: no TOML ({error})") from None
    return checked(found, path)


def checked(found: dict[str, Any], source: Path) -> Config:
    """The configuration that a TOML document is.

    Raises:
        InputError: it says something that nobody knows.
    """
    try:
        config = Config.model_validate(found)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_in_words(each) for each in error.errors()[:3])}") from None
    beside = {name: path and (source.parent / path) for name in ("model", "bundle") if (path := getattr(config, name))}
    return config.model_copy(update=beside)


def _in_words(error: Any) -> str:
    where = ".".join(str(each) for each in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: no such setting; see docs/serve.md for those that there are"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message} (found {error['input']!r:.60})" if where else message


def parts(config: Config) -> tuple[Path, Path]:
    """Model and bundle, which are there, as the engine is: before anything is started.

    Raises:
        InputError: one of them is not.
    """
    program = config.engine.program
    if program != XLLAMACPP and not Path(program).is_file():
        raise InputError(f"{program}: no such engine; give {XLLAMACPP}, or the path of a llama-server")
    return _there("model", "file", config.model), _there("bundle", "directory", config.bundle)


def _there(name: str, kind: str, path: Path | None) -> Path:
    if path is None:
        raise InputError(f"no {name} was given; give --{name}, or {name} = ... in serve.toml")
    if not path.exists():
        raise InputError(f"{path}: no such {kind}; it was given as the {name}")
    return path


def default_settings(config: Config) -> Settings:
    """Strength and guard where no rule names them: the bundle's own.

    Raises:
        InputError: model or bundle cannot be used.
    """
    model, bundle = parts(config)
    return resolve(Bundle.open(bundle), str(model), None, None)


def pepper(config: Config) -> Path:
    """The file that keys are hashed with.

    Raises:
        InputError: keys lie in Redis, and no file was named.
    """
    if config.pepper is not None:
        return config.pepper
    if is_redis(config.state):
        raise InputError("state is in Redis, so every node needs the same pepper file; name it: pepper = PATH")
    return (Path(config.state) if config.state else default_directory()) / "pepper"
