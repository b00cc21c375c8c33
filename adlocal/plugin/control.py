"""Control files: what a program under protection does, and is asked to do (native/include/adlocal-control.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..settings import Settings

MAGIC, VERSION, N_SEQ_MAX = b"adlctrl", 2, 256
#: By their numbers in enum adl_mode.
MODES = ("off", "observe", "protect")
#: enum adl_think_state.
_THINK_ALLOWED, _THINK_ONCE, _THINK_NEVER = range(3)
_NO_TOKEN = -1


class _Settings(ctypes.Structure):
    _fields_ = [
        ("epoch", ctypes.c_uint64),
        ("strength", ctypes.c_double),
        ("guard", ctypes.c_double),
        ("mode", ctypes.c_int32),
        ("think_open", ctypes.c_int32),
        ("think_close", ctypes.c_int32),
        ("think_state", ctypes.c_int32),
    ]


class _Counters(ctypes.Structure):
    _fields_ = [
        *(
            (f"n_{name}", ctypes.c_uint64)
            for name in ("begun", "decoded", "rows", "choices", "evaluated", "closed", "dosed")
        ),
        ("kl", ctypes.c_double),
        ("dose", ctypes.c_double),
    ]


class _Sequence(ctypes.Structure):
    _fields_ = [("asked", _Settings), ("in_force", _Settings), ("counters", _Counters)]


class _File(ctypes.Structure):
    _fields_ = [
        ("magic", ctypes.c_char * 8),
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("started", ctypes.c_int64),
        ("program", ctypes.c_char * 64),
        ("bundle", ctypes.c_char * 1024),
        ("floor", _Settings),
        ("n_decodes_begun", ctypes.c_uint64),
        ("n_decodes_ended", ctypes.c_uint64),
        ("sequences", _Sequence * N_SEQ_MAX),
    ]


@dataclass(frozen=True)
class Think:
    """A ban of the tokens that begin and end reasoning: their logits are −inf, at any strength.

    Attributes:
        open: the token that begins reasoning; None where no single one does.
        close: the token that ends it; None where no single one does.
        from_start: they are banned in every row; otherwise once the request has sampled `close` itself, and not before.
    """

    open: int | None
    close: int | None
    from_start: bool = False


@dataclass(frozen=True)
class InForce:
    """What a sequence is protected with.

    Attributes:
        strength: nats.
        guard: share of the top token's probability.
        mode: "off", "observe" or "protect".
        epoch: of the settings that were asked for; 0 where nobody asked.
        think: the ban of its reasoning tokens; None for none.
    """

    strength: float
    guard: float
    mode: str
    epoch: int
    think: Think | None = None


@dataclass(frozen=True)
class Decodes:
    """A program's calls of llama_decode, llama_encode and llama_process on what is protected, since it began.

    One is under way while `begun` is greater than `ended`.

    Attributes:
        begun: calls that were made.
        ended: of these, the ones that came back, with errors too.
    """

    begun: int
    ended: int


@dataclass(frozen=True)
class Counters:
    """What has become of a sequence since its program began.

    Attributes:
        n_begun: how often its settings were read, which is when a request begins.
        n_decoded: tokens decoded for it, of prompts, sampled and drafted; a batch's when its decode ends.
        n_rows: rows that could be sampled from, those of drafts too.
        n_choices: of these, where at least two tokens passed the guard.
        n_evaluated: of these, where the pair was evaluated.
        n_closed: rows that were closed, because Δ could not be computed, the settings made no sense, or all was banned.
        n_dosed: tokens that came back after a row with doses.
        kl: KL(adjusted ‖ teacher), summed over rows, nats.
        dose: summed over `n_dosed` tokens.
    """

    n_begun: int = 0
    n_decoded: int = 0
    n_rows: int = 0
    n_choices: int = 0
    n_evaluated: int = 0
    n_closed: int = 0
    n_dosed: int = 0
    kl: float = 0.0
    dose: float = 0.0

    def __add__(self, other: Counters) -> Counters:
        return Counters(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: Counters) -> Counters:
        return Counters(**{name: value - getattr(other, name) for name, value in vars(self).items()})


class Control:
    """An open control file, of a program that may live or not.

    Attributes:
        path: the file.
        pid, program, bundle: of the program.
        started: seconds since 1970.
        floor: what the program was started with.
    """

    def __init__(self, path: Path, file: _File) -> None:
        self.path = path
        self._file = file
        self.pid = int(file.pid)
        self.program = file.program.decode(errors="replace")
        self.bundle = Path(os.fsdecode(file.bundle))
        self.started = int(file.started)
        self.floor = _in_force(file.floor)

    @classmethod
    def open(cls, path: Path) -> Control:
        """Maps a control file.

        Raises:
            InputError: it is none, or of another version of adlocal.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; `adlocal status` lists the control files there are") from None
        try:
            if os.fstat(descriptor).st_size < ctypes.sizeof(_File):
                raise InputError(f"{path}: not a control file of adlocal")
            file = _File.from_buffer(mmap.mmap(descriptor, ctypes.sizeof(_File)))
        finally:
            os.close(descriptor)
        if file.magic != MAGIC:
            raise InputError(f"{path}: not a control file of adlocal")
        if (file.version, file.size) != (VERSION, ctypes.sizeof(_File)):
            raise InputError(
                f"{path}: a control file of version {file.version}, and this adlocal knows version {VERSION}; "
                "use the adlocal that started the program"
            )
        return cls(path, file)

    def ask(self, seq_id: int, settings: Settings, mode: str = "protect", think: Think | None = None) -> int:
        """Asks for settings that the sequence is given when it next begins; returns their epoch.

        The program never gives less than it was started with. `think` bans reasoning tokens whatever the mode; None
        bans nothing.

        Raises:
            InputError: there is no such sequence, no such mode, or nothing that the ban could begin with.
        """
        if mode not in MODES:
            raise InputError(f"mode={mode!r}: give one of {', '.join(MODES)}")
        banned = _as_written(think)
        asked = self._sequence(seq_id).asked
        asked.epoch |= 1
        asked.strength, asked.guard, asked.mode = settings.strength, settings.guard, MODES.index(mode)
        asked.think_open, asked.think_close, asked.think_state = banned
        asked.epoch += 1
        return int(asked.epoch)

    def in_force(self, seq_id: int) -> InForce:
        """What the sequence was given when it last began.

        Raises:
            InputError: there is no such sequence.
        """
        return _in_force(self._sequence(seq_id).in_force)

    def counters(self, seq_id: int | None = None) -> Counters:
        """Of one sequence, or the sum over all.

        Raises:
            InputError: there is no such sequence.
        """
        if seq_id is None:
            return sum((self.counters(each) for each in range(N_SEQ_MAX)), Counters())
        counters = self._sequence(seq_id).counters
        return Counters(*(getattr(counters, name) for name, *_ in _Counters._fields_))

    def decodes(self) -> Decodes:
        """How many calls have begun and ended, of all sequences together."""
        ended = int(self._file.n_decodes_ended)  # first: more may begin and end in between
        return Decodes(int(self._file.n_decodes_begun), ended)

    def begun(self) -> list[int]:
        """The sequences that have ever begun."""
        return [seq_id for seq_id in range(N_SEQ_MAX) if self._file.sequences[seq_id].counters.n_begun]

    def _sequence(self, seq_id: int) -> _Sequence:
        if not 0 <= seq_id < N_SEQ_MAX:
            raise InputError(f"seq_id={seq_id}: give one from 0 to {N_SEQ_MAX - 1}")
        sequence: _Sequence = self._file.sequences[seq_id]
        return sequence


def _in_force(settings: _Settings) -> InForce:
    mode = MODES[settings.mode] if settings.mode in range(len(MODES)) else str(settings.mode)
    return InForce(settings.strength, settings.guard, mode, int(settings.epoch), _as_read(settings))


def _as_written(think: Think | None) -> tuple[int, int, int]:
    if think is None:
        return _NO_TOKEN, _NO_TOKEN, _THINK_ALLOWED
    if think.close is None and not think.from_start:
        raise InputError("close=None: give the token that ends reasoning, or from_start=True")
    for token in (think.open, think.close):
        if token is not None and token < 0:
            raise InputError(f"{token}: give a token's id, or None for none")
    tokens = [_NO_TOKEN if token is None else token for token in (think.open, think.close)]
    return tokens[0], tokens[1], _THINK_NEVER if think.from_start else _THINK_ONCE


def _as_read(settings: _Settings) -> Think | None:
    if settings.think_state not in (_THINK_ONCE, _THINK_NEVER):
        return None
    tokens = [None if token < 0 else int(token) for token in (settings.think_open, settings.think_close)]
    return Think(tokens[0], tokens[1], from_start=settings.think_state == _THINK_NEVER)
