"""Capabilities: the traces files of one conversion, encoded, and their gradients, computed once and kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from adlocal.errors import ConversionError, InputError
from adlocal.files import write_failure
from adlocal.traces import EncodedTrace, TraceEncoder, encode_all, read_traces, remarks

from ..model.proxy import Proxy
from .gradient import Gradient, Settings, compute_gradient

DEFAULT_NAME = "traces"
_MOST_HELD_OUT = 4
# Enters the keys of saved gradients: raise it when a gradient would come out otherwise.
_METHOD = "1"
_MORE_ROOM = "free some, or name another directory in ADLOCAL_CACHE"
# Low memory counts a trace in parts.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} traces [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Capability:
    """What one traces file shows, encoded and split.

    Attributes:
        name: what `--traces NAME=FILE` calls it, and which tokens count if not all do.
        learned: give the gradient.
        held_out: measure fidelity and delta_scale.
        sha256: of the file, or of the traces of a dataset.
        report: how many there are, and what happened to the others.
    """

    name: str
    learned: list[EncodedTrace]
    held_out: list[EncodedTrace]
    sha256: str
    report: str

    @classmethod
    def read(cls, name: str, path: Path, encoder: TraceEncoder, n_ctx: int, loss_on: str | None = None) -> Capability:
        """Reads a file of traces; see `Options` for the rest.

        Raises:
            TraceError or InputError: the file cannot be read, or holds too little.
        """
        read = read_traces(path)
        encoded, n_cut, n_skipped = encode_all(read, encoder, n_ctx)
        if len(encoded) < 2:
            raise InputError(f"{path}: {len(encoded)} usable trace; give at least 2, one is held out; better 50")
        n_held_out = min(_MOST_HELD_OUT, max(1, len(encoded) // 5))
        learned, held_out = encoded[:-n_held_out], encoded[-n_held_out:]
        n_without = 0
        if loss_on is not None:
            name, n_whole = f"{name} on /{loss_on}/", len(learned)
            learned = encoder.narrowed(learned, loss_on)
            n_without = n_whole - len(learned)
            if not learned:
                raise InputError(f"--loss-on {loss_on}: found in no token of {path}'s completions; give another")
        counts = {
            "cut to the context": n_cut,
            "skipped, their prompts fill it": n_skipped,
            "duplicates, left out": read.n_duplicates,
            "left out, they have no text": read.n_empty,
            "left out, no token of them counts": n_without,
        }
        notes = [*(f"{n} {what}" for what, n in counts.items() if n), *remarks(read, encoder)]
        return cls(name, learned, held_out, read.sha256, _report(name, learned, held_out, notes))

    def gradient(
        self, proxy: Proxy, base_sha256: str, params: str, names: Sequence[str], cache: Path, settings: Settings
    ) -> Gradient:
        """Opens the gradient over the tensors `names` if it was saved, or computes and saves it.

        Args:
            proxy: the base.
            base_sha256: of its file.
            params: the selection that `names` is; a saved gradient over all parameters serves any.
            names: GGUF tensor names.
            cache: directory of saved gradients.
            settings: of a computation.
        """
        paths = {p: self.saved_at(cache, base_sha256, p) for p in dict.fromkeys((params, "all"))}
        for path in paths.values():
            if saved := Gradient.open(path):
                return saved
        path = paths[params]
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_room(cache, 4 * sum(t.n_weights for t in proxy.tensors if t.name in names))
            with tqdm(total=len(self.learned), desc=f"gradient of {self.name}", unit="trace", bar_format=_BAR) as bar:
                gradient = compute_gradient(proxy, self.learned, names, path, settings, _counting(bar))
        except OSError as error:
            path.with_name(path.name + ".new").unlink(missing_ok=True)
            reason = write_failure(error)
            raise ConversionError(f"cannot write the gradient to {cache}: {reason}; {_MORE_ROOM}") from None
        for stray in cache.glob(f"{path.name}.*"):  # of a run with other settings that was interrupted
            stray.unlink()
        return gradient

    def saved_at(self, cache: Path, base_sha256: str, params: str) -> Path:
        """Where the gradient over a selection of parameters is kept."""
        digest = hashlib.sha256(f"{_METHOD}\n{base_sha256}\n{params}\n".encode())
        for trace in self.learned:
            digest.update(repr((trace.tokens, trace.targets)).encode())
        return cache / f"{digest.hexdigest()[:32]}.safetensors"


def parse_traces(given: Sequence[str]) -> dict[str, Path]:
    """Name -> path of `--traces FILE` or `--traces NAME=FILE ...`.

    Raises:
        InputError: a name stands twice, or one of several files has none.
    """
    named: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:  # a path may hold "="
            name, path = DEFAULT_NAME, text
        if name in named:
            raise InputError(
                f"--traces {text}: name several files apart, as in --traces math=a.jsonl --traces code=b.jsonl"
            )
        named[name] = Path(path)
    return named


def _check_room(cache: Path, n_bytes: int) -> None:
    """Raises ConversionError unless the cache's disk has `n_bytes` left."""
    stat = os.statvfs(cache) if hasattr(os, "statvfs") else None
    if stat and stat.f_bavail * stat.f_frsize < n_bytes:
        left = stat.f_bavail * stat.f_frsize
        raise ConversionError(
            f"{cache} has {left / 1e9:.1f} GB left and the gradient takes {n_bytes / 1e9:.1f} GB; {_MORE_ROOM}"
        )


def _report(name: str, learned: Sequence[EncodedTrace], held_out: Sequence[EncodedTrace], notes: Sequence[str]) -> str:
    n_tokens = sum(t.n_targets for t in learned)
    line = f"{name}: {len(learned)} traces with {n_tokens:,} tokens to learn from, {len(held_out)} held out"
    return "; ".join([line, *notes])


def _counting(bar: tqdm[object]) -> Callable[[float, float], None]:
    def count(n: float, loss: float) -> None:
        bar.update(n)
        bar.set_postfix({"loss": f"{loss:.4f}"})

    return count
