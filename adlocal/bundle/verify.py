"""Whether a bundle is as `adlocal convert` wrote it, to the last byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from ..llamacpp.gguf import GGUFHeader
from .metadata import ADAPTER, Bundle


def verify(bundle: Bundle | str | os.PathLike[str], progress: Callable[[int], None] = lambda n: None) -> None:
    """Reads every byte that convert wrote of ĝ.

    Of halves every tensor is read: bulk tensors must be identical, carriers must match their hash. Then Δ is one
    model's along the direction that was converted; only bulk that was altered alike in both halves goes unnoticed.

    Of an adapter bundle the adapter is read: it must match its hash. Then the direction is the one that was converted;
    of the base only the metadata are compared, so weights of the base that were altered go unnoticed.

    Args:
        bundle: the bundle, or its directory.
        progress: told the number of bytes just read, of `verified_files`.

    Raises:
        BundleError: naming the tensor or the file that does not fit.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    files = bundle.headers()
    if bundle.format == ADAPTER:
        _check_data(files[1:], {t.name for t in files[1].tensors}, bundle.carriers_sha256, progress)
        return
    _check_headers(*files)
    _check_data(files, set(bundle.carriers), bundle.carriers_sha256, progress)


def verified_files(bundle: Bundle) -> tuple[Path, ...]:
    """The files that `verify` reads whole."""
    return bundle.files[1:] if bundle.format == ADAPTER else bundle.files


def _check_data(
    files: Sequence[GGUFHeader], carriers: Collection[str], sha256: Sequence[str], progress: Callable[[int], None]
) -> None:
    """Carriers of each file must match its hash, all other tensors must be the same in every file."""
    digests = [hashlib.sha256() for _ in files]
    for tensor, *data in zip(files[0].tensors, *map(_data, files), strict=True):
        if tensor.name in carriers:
            for digest, values in zip(digests, data, strict=True):
                digest.update(values.data)
        elif not np.array_equal(*data):
            where = files[0].path.parent
            raise BundleError(f"{where}: bulk tensor {tensor.name} differs between the halves; convert again")
        progress(len(files) * tensor.n_bytes)
    for file, digest, stored in zip(files, digests, sha256, strict=True):
        if digest.hexdigest() != stored:
            raise BundleError(f"{file.path}: its carriers were altered since conversion; convert again")


def _check_headers(plus: GGUFHeader, minus: GGUFHeader) -> None:
    """Everything before the tensors' data, tokenizer and all, must be the same but for the four bytes of the sign."""
    a, b = (np.memmap(half.path, dtype=np.uint8, mode="r")[: half.tensors[0].offset] for half in (plus, minus))
    differing = np.flatnonzero(a != b) if len(a) == len(b) else np.arange(len(a))
    if len(differing) != 4 or differing[-1] - differing[0] != 3:
        raise BundleError(f"{plus.path.parent}: the halves' metadata differ in more than the sign; convert again")


def _data(half: GGUFHeader) -> Iterable[npt.NDArray[np.uint8]]:
    """Bytes of each tensor, in the order of the header."""
    mapped = np.memmap(half.path, dtype=np.uint8, mode="r")
    for tensor in half.tensors:
        yield mapped[tensor.offset : tensor.offset + tensor.n_bytes]
