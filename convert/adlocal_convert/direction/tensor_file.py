"""A safetensors file of float32 tensors, changed and read in place, of which little is ever in memory.

The file is mapped. Whatever was touched is given back to the page cache at once, so that it does not count as this
process's memory; the system writes it out when it has to. Where memory is plentiful, the same tensors may lie in memory
until they are saved: a sum that is added to every few seconds keeps a slow disk busy.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

_HEADER_ROOM = 4096  # bytes that metadata may grow by after creation; the format allows trailing spaces


class TensorFile:
    """Named float32 tensors in one safetensors file.

    Attributes:
        path: the file.
        shapes: name -> shape, in file order.
        metadata: strings that the header holds; saved by `save_as`.
    """

    def __init__(self, path: Path) -> None:
        """Opens an existing file.

        Raises:
            ValueError: it is no file that `create` made.
            OSError: it cannot be opened.
        """
        self.path = path
        with open(path, "r+b") as file:
            self._take(mmap.mmap(file.fileno(), 0))
        self._on_disk = True

    def _take(self, mapped: mmap.mmap) -> None:
        self._map = mapped
        self._room = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + self._room])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t["shape"]) for name, t in header.items()}
        self._starts = {name: 8 + self._room + t["data_offsets"][0] for name, t in header.items()}
        if max((8 + self._room + t["data_offsets"][1] for t in header.values()), default=0) != len(self._map):
            raise ValueError(f"{self.path}: not as long as its header says")

    @classmethod
    def create(cls, path: Path, shapes: Mapping[str, tuple[int, ...]], *, in_memory: bool = False) -> TensorFile:
        """Makes zeros: a file readable by its owner alone, or memory that becomes one with `save_as`.

        On most file systems zeros take no room until they are changed.
        """
        header, offset = {}, 0
        for name, shape in shapes.items():
            end = offset + 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps({"__metadata__": {}, **header}).encode()
        room = (len(text) + _HEADER_ROOM + 7) // 8 * 8
        start = struct.pack("<Q", room) + text.ljust(room)
        if in_memory:
            made = cls.__new__(cls)
            made.path, made._on_disk = path, False
            mapped = mmap.mmap(-1, len(start) + offset)
            mapped[: len(start)] = start
            made._take(mapped)
            return made
        path.touch(mode=0o600)
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(len(start) + offset)
        return cls(path)

    def save_as(self, path: Path) -> None:
        """Closes it and gives it another name, at once and whole. An error leaves what had that name before."""
        self._save_metadata()
        if self._on_disk:
            self._map.flush()
        else:
            self.path.touch(mode=0o600)
            self.path.write_bytes(self._map)
        self._map.close()
        os.replace(self.path, path)

    def close(self) -> None:
        """Lets go of the file."""
        self._map.close()

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def get(self, name: str) -> torch.Tensor:
        """A copy of a tensor."""
        return self._copied(name, self._view(name))

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Copies of some rows of a matrix, in the order of `ids`."""
        return self._copied(name, self._view(name)[ids.cpu().numpy()])

    def add(self, name: str, values: torch.Tensor) -> None:
        """Adds to a whole tensor."""
        view = self._view(name)
        view += values.detach().cpu().numpy().reshape(view.shape)
        del view
        self._release(name)

    def add_product(self, name: str, first_row: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds a @ b to the rows from `first_row` on, without a matrix in between."""
        band = torch.from_numpy(self._view(name)[first_row : first_row + len(a)])
        band.addmm_(a.cpu(), b.cpu())
        del band
        self._release(name)

    def add_rows(self, name: str, ids: torch.Tensor, values: torch.Tensor) -> None:
        """Adds to rows of a matrix; an id that stands twice is added twice."""
        view = self._view(name)
        different, position = ids.cpu().unique(return_inverse=True)
        total = torch.zeros(len(different), values.shape[-1]).index_add_(0, position, values.detach().cpu().float())
        view[different.numpy()] += total.numpy()
        del view
        self._release(name)

    def _save_metadata(self) -> None:
        header, start = {}, 8 + self._room
        for name, shape in self.shapes.items():
            first = self._starts[name] - start
            offsets = [first, first + 4 * int(np.prod(shape))]
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": self.metadata, **header}).encode()
        self._map[8:start] = text.ljust(self._room)

    def _view(self, name: str) -> npt.NDArray[np.float32]:
        shape = self.shapes[name]
        flat = np.frombuffer(self._map, np.float32, int(np.prod(shape)), self._starts[name])
        return flat.reshape(shape)

    def _copied(self, name: str, view: npt.NDArray[np.float32]) -> torch.Tensor:
        copy = torch.from_numpy(np.array(view))
        self._release(name)
        return copy

    def _release(self, name: str) -> None:
        if not (self._on_disk and hasattr(self._map, "madvise")):  # Windows has none
            return
        start = self._starts[name] // mmap.PAGESIZE * mmap.PAGESIZE
        end = self._starts[name] + 4 * int(np.prod(self.shapes[name]))
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
