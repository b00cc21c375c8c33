"""Keys: `adl_<id>_<secret>`, whose secret is 256 random bits.

A key is shown once. What is kept is its HMAC-SHA-256 under a pepper, a file of its own: who reads the store alone
learns nothing that opens the gateway. A slow hash would add nothing, since nobody guesses 256 bits, and would cost each
request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdlocalError, InputError
from .events import Failed
from .limits import MOST
from .state.protocol import KeyRecord, Store

__all__ = ["FRESH", "KeyRecord", "Keys", "open_keys", "read_pepper"]

#: Seconds for which a key that was looked up is taken as it was: a revocation is in force after at most as many.
FRESH = 1.0
_ALPHABET = string.ascii_lowercase + string.digits
_KEY = re.compile(r"adl_([a-z0-9]{8})_[A-Za-z0-9_-]{43}", re.ASCII)
_NAME = re.compile(r"[^\W_][\w.@+-]{0,63}")
_PEPPER_BYTES = 32
_UNKNOWN = "this key is not known; send a key as Authorization: Bearer KEY or as X-Api-Key: KEY"
_log = logging.getLogger(__name__)


async def open_keys(store: Store, pepper: Path, clock: Callable[[], float] = time.time) -> Keys:
    """The keys of a store, with the file of their pepper, which is made with the first.

    Args:
        store: where the keys are.
        pepper: the file; the same on every node.
        clock: seconds since 1970.

    Raises:
        InputError: the file is missing, or is not the one that the store's keys were made with.
        AdlocalError: the store cannot be used.
    """
    secret = read_pepper(pepper, may_make=await store.pepper_mark(None) is None)
    mark = hmac.digest(secret, b"adlocal pepper", "sha256").hex()
    if await store.pepper_mark(mark) != mark:
        raise InputError(f"pepper {pepper} is not the one that the keys were made with; give that file")
    return Keys(store, secret, clock)


def read_pepper(path: Path, may_make: bool) -> bytes:
    """The pepper of a file, which may be made with mode 0600 if there is none. Of several processes, one makes it.

    Raises:
        InputError: the file cannot be read or made, or is too short.
    """
    try:
        if may_make and not path.exists():
            _write_pepper(path)
        secret = path.read_bytes()
    except OSError as error:
        raise InputError(f"pepper {path}: {error.strerror}; give the file that the keys were made with") from None
    if len(secret) < _PEPPER_BYTES:
        raise InputError(f"pepper {path} has {len(secret)} bytes of at least {_PEPPER_BYTES}; give the right file")
    return secret


def _write_pepper(path: Path) -> None:
    """Writes a file beside it and gives that the name, which fails if another process was first: nobody reads half."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(8)}.partial")
    try:
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_PEPPER_BYTES))
            file.flush()
            os.fsync(file.fileno())  # no key would ever open anything again
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Known:
    record: KeyRecord
    digest: str
    read: float


class Keys:
    """The keys of a store.

    Args:
        store: where they are.
        pepper: secret bytes.
        clock: seconds since 1970.
    """

    def __init__(self, store: Store, pepper: bytes, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._pepper = pepper
        self._clock = clock
        self._known: dict[str, _Known] = {}

    async def add(
        self,
        owner: str,
        *,
        tier: str = "default",
        expires: int | None = None,
        operator: bool = False,
        trusted: bool = False,
        budget_tokens: int | None = None,
        declared: str | None = None,
        note: str = "",
    ) -> tuple[str, KeyRecord]:
        """Makes a key. Its text is given here, and never again. Arguments as the attributes of `KeyRecord`.

        Raises:
            InputError: a value makes no sense.
            AdlocalError: the store cannot be used.
        """
        created = int(self._clock())
        _check(owner, tier, note, budget_tokens)
        if expires is not None and expires <= created:
            raise InputError("expires: this time has passed; give a later one")
        while True:
            id = "".join(secrets.choice(_ALPHABET) for _ in range(8))
            key = f"adl_{id}_{secrets.token_urlsafe(32)}"
            record = KeyRecord(
                id, owner, tier, created, expires, None, operator, trusted, budget_tokens, declared, note
            )
            if await self._store.add_key(record, self._digest(key)):
                return key, record

    async def records(self) -> list[KeyRecord]:
        """All keys, revoked ones too, the oldest first."""
        return await self._store.keys()

    async def revoke(self, id: str) -> None:
        """Revokes a key for ever, everywhere within `FRESH` seconds. One that is revoked already stays as it is.

        Raises:
            InputError: there is no such key.
        """
        if not await self._store.revoke_key(id, int(self._clock())):
            raise InputError(f"key {id}: there is none of this id; see adlocal keys list")
        self._known.pop(id, None)

    async def authenticate(self, authorization: str | None, x_api_key: str | None) -> KeyRecord:
        """The key that a request bears.

        Args:
            authorization: that header, "Bearer KEY"; None where the request has none.
            x_api_key: that header, KEY.

        Raises:
            Failed: 401. Only who has the whole key is told that it was revoked or has expired. 503 where the store
                cannot be used.
        """
        key = _presented(authorization, x_api_key)
        matched = _KEY.fullmatch(key)
        known = await self._look_up(matched[1]) if matched else None
        # An unknown id takes as long as a wrong secret: it is compared with a digest that nothing has.
        kept = known.digest if known else "-" * hashlib.sha256().digest_size * 2
        if not hmac.compare_digest(self._digest(key), kept) or known is None:
            raise _denied(_UNKNOWN)
        return self._in_force(known.record)

    async def _look_up(self, id: str) -> _Known | None:
        known = self._known.get(id)
        if known and 0 <= time.monotonic() - known.read < FRESH:
            return known
        read = time.monotonic()
        try:
            found = await self._store.key(id)
        except AdlocalError as error:
            _log.error("%s", error)
            raise Failed(
                503, "unavailable_error", "keys cannot be checked at the moment; try again later", retry_after=5.0
            ) from None
        if found is None:
            self._known.pop(id, None)
            return None
        self._known[id] = known = _Known(*found, read)
        return known

    def _in_force(self, record: KeyRecord) -> KeyRecord:
        if record.revoked is not None:
            raise _denied("this key was revoked; ask the operator for another")
        if record.expires is not None and record.expires <= self._clock():
            raise _denied("this key has expired; ask the operator for another")
        return record

    def _digest(self, key: str) -> str:
        return hmac.digest(self._pepper, key.encode(errors="replace"), "sha256").hex()


def _presented(authorization: str | None, x_api_key: str | None) -> str:
    """The one key of two headers; a text that is no key where a header is malformed."""
    keys = set()
    if authorization is not None:
        scheme, _, key = authorization.strip().partition(" ")
        keys.add(key.strip() if scheme.lower() == "bearer" else "")
    if x_api_key is not None:
        keys.add(x_api_key.strip())
    if not keys:
        raise _denied("no key was sent; send one as Authorization: Bearer KEY or as X-Api-Key: KEY")
    if len(keys) > 1:
        raise _denied("Authorization and X-Api-Key are different keys; send one of them")
    return keys.pop()


def _check(owner: str, tier: str, note: str, budget_tokens: int | None) -> None:
    for what, name in (("owner", owner), ("tier", tier)):
        if not _NAME.fullmatch(name):
            raise InputError(f"{what} {name!r}: give up to 64 letters, digits and any of . _ @ + -, with no space")
    if not note.isprintable() or len(note) > 1000:
        raise InputError(f"note of {len(note)} characters: give one line of at most 1000")
    if budget_tokens is not None and not 1 <= budget_tokens <= MOST:
        raise InputError(f"budget {budget_tokens}: give from 1 to {MOST} tokens")


def _denied(message: str) -> Failed:
    return Failed(401, "authentication_error", message)
