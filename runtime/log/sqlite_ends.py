"""How far each partition of a file was kept, told beside it after every commit.

A file that ends before that has lost records which were acknowledged. It is not synced: a killed process leaves what
it told, a power cut perhaps less, and nothing ever tells too much. Left out: what is done about a loss.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Final

SUFFIX: Final = "-ends"

#: An end, and its complement: a damaged entry tells nothing.
_ENTRY: Final = Struct("<QQ")
_MASK: Final = (1 << 64) - 1


class Ends:
    """Writes them, for the file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + SUFFIX)
        self._descriptor: int | None = None

    def tell(self, ends: Mapping[int, int]) -> None:
        """What cannot be written is not told: a loss would be noticed later then, or not at all."""
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            for partition, end in ends.items():
                os.pwrite(self._descriptor, _ENTRY.pack(end, end ^ _MASK), partition * _ENTRY.size)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def told_ends(path: Path) -> dict[int, int]:
    """Of the partitions of the file at `path` that were written to, as far as that is known."""
    try:
        content = path.with_name(path.name + SUFFIX).read_bytes()
    except OSError:
        return {}
    entries = _ENTRY.iter_unpack(content[: len(content) // _ENTRY.size * _ENTRY.size])
    return {partition: end for partition, (end, inverse) in enumerate(entries) if end and end ^ inverse == _MASK}
