"""Models on the hub, through huggingface_hub: its cache (HF_HOME), token (HF_TOKEN), offline mode (HF_HUB_OFFLINE)."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from adlocal.errors import AdlocalError, ConversionError, InputError

from .splits import part_names

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"  # as transformers saves
_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?::(?P<choice>[^:]+))?")
_SNAPSHOT = [CONFIG, "tokenizer.json", "model*.safetensors", INDEX]
# Base of what its HTTP client raises; huggingface_hub has changed the client, and keeps this name.
_HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]


def parse(spec: str) -> tuple[str, str | None] | None:
    """`owner/name`, `owner/name:file.gguf` or `owner/name:Q8_0` as repository and choice; None if it is no hub id."""
    match = _ID.fullmatch(spec)
    return (match["repository"], match["choice"]) if match else None


class Repository:
    """One model repository: what it holds, on the hub or, where that cannot be reached, in the cache.

    Attributes:
        id: `owner/name`.
        names: its files.

    Raises:
        InputError: it does not exist or is closed to this user.
        ConversionError: the hub cannot be reached and the cache does not hold it.
    """

    def __init__(self, repository: str) -> None:
        self.id = repository
        with _hub_errors(repository):
            self.names, self._cached = _names(repository)

    @property
    def has_safetensors(self) -> bool:
        """It holds a model as transformers saves it."""
        return CONFIG in self.names and (SINGLE in self.names or INDEX in self.names)

    def choose(self, choice: str | None) -> list[str]:
        """The parts, one or more, of the GGUF that is meant.

        Args:
            choice: name of a file, or of a quantization as llama.cpp's -hf takes it; without one, Q4_K_M or the only
                file there is.

        Raises:
            InputError: no file or several fit; they are listed.
        """
        ggufs = [n for n in self.names if n.endswith(".gguf") and "mmproj" not in n and n == _first(n)]
        if not ggufs:
            raise InputError(f"{self.id}: it holds neither safetensors nor GGUF files; give another repository")
        if choice is not None and choice.endswith(".gguf"):
            chosen = [_first(choice)] if choice in self.names else []
        elif choice is None and len(ggufs) == 1:
            chosen = ggufs
        else:
            chosen = [name for name in ggufs if _has_type(name, choice or "Q4_K_M")]
        if len(chosen) != 1:
            what = "no file" if not chosen else f"{len(chosen)} files"
            listed = ", ".join(chosen or ggufs)
            raise InputError(f"{self.id}: {what} for {choice or 'Q4_K_M'}; give {self.id}:FILE with one of {listed}")
        return part_names(chosen[0]) or chosen

    def snapshot(self) -> Path:
        """Downloads configuration, weights and tokenizer.json; returns their directory."""
        with _hub_errors(self.id):
            return Path(
                huggingface_hub.snapshot_download(self.id, allow_patterns=_SNAPSHOT, local_files_only=self._cached)
            )

    def fetch(self, names: list[str]) -> Path:
        """Downloads files; returns the path of the first."""
        with _hub_errors(self.id):
            paths = [huggingface_hub.hf_hub_download(self.id, n, local_files_only=self._cached) for n in names]
        return Path(paths[0])


def _first(name: str) -> str:
    return next(iter(part_names(name)), name)


def _has_type(name: str, quantization: str) -> bool:
    return re.search(rf"(^|[-._/]){re.escape(quantization)}[-./]", name, re.IGNORECASE) is not None


def _names(repository: str) -> tuple[list[str], bool]:
    """Its files, and whether they are those of the cache, because the hub cannot be reached."""
    try:
        siblings = huggingface_hub.HfApi().model_info(repository).siblings or []
        return [sibling.rfilename for sibling in siblings], False
    except errors.HfHubHTTPError:
        raise
    except (errors.OfflineModeIsEnabled, _HTTPError) as error:
        if names := _cached_names(repository):
            return names, True
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise ConversionError(f"{repository} is not in the cache, and HF_HUB_OFFLINE is set; unset it") from None
        raise


def _cached_names(repository: str) -> list[str]:
    try:
        root = Path(huggingface_hub.snapshot_download(repository, local_files_only=True, allow_patterns=[]))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return []
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Tells in one line what huggingface_hub and its HTTP client raise."""
    try:
        yield
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, _HTTPError) as error:
        raise _explain(repository, error) from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        remedy = "free some space, or set HF_HOME" if error.errno == errno.ENOSPC else "try again"
        raise ConversionError(f"cannot store {repository} in {constants.HF_HUB_CACHE}: {reason}; {remedy}") from None


def _explain(repository: str, error: Exception) -> AdlocalError:
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{repository}: no valid hub id; give owner/name")
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return InputError(f"{repository} is gated; accept its licence at {page} and set HF_TOKEN to a token of yours")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return InputError(f"{repository}: no such local path or hub repository; check the name, or set HF_TOKEN")
    if status:
        return ConversionError(f"the hub answers {status} for {repository}; try again later")
    reason = " ".join(str(error.__cause__ or error).split())
    return ConversionError(
        f"connection to {constants.ENDPOINT} failed ({reason}), and the cache does not hold all of {repository}; "
        "try again, a download continues where it stopped"
    )
