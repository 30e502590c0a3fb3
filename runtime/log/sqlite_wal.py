"""What stands in a SQLite file's `-wal`, judged without SQLite, which silently passes over all behind a broken frame.

The format: https://sqlite.org/fileformat2.html#walformat. Left out: what is done about damage (`sqlite_store`,
`sqlite_salvage`).
"""

import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

SUFFIX: Final = "-wal"

_HEADER: Final = Struct(">8I")
_FRAME: Final = Struct(">6I")
_MAGIC: Final = 0x377F0682
_PAGE_BYTES: Final = 4_096
"""Of a WAL whose header cannot be believed: SQLite's default, with which all files are made."""
_SALTED_FRAMES: Final = 5
_SUMMED_BYTES: Final = 8
"""Of a frame's header; its page is summed too."""
_LOOKS_MAX: Final = 10
_MASK: Final = 0xFFFFFFFF

Sum = tuple[int, int]


class Frame(NamedTuple):
    """One page as a commit left it."""

    page: int
    commit: int
    """Pages of the database after the commit that this frame ends; 0 for all other frames."""
    content: bytes
    is_whole: bool
    """Whether it is what was written since the WAL began anew."""
    is_read: bool
    """Whether SQLite comes to it: it and all before it are as they should be."""


class Verdict(NamedTuple):
    """What SQLite makes of a WAL, and whether that is all of it."""

    frames: int
    """How many SQLite uses, up to the last commit it comes to."""
    whole_end: int
    """Where the last whole commit ends, counted in frames."""
    is_damaged: bool


class _Header(NamedTuple):
    order: str
    page_bytes: int
    salts: tuple[int, int]
    sum: Sum
    is_whole: bool


def judge(path: Path) -> Verdict | None:
    """Of the WAL at `path`, which a process may be writing; None where there is none. Raises `OSError`."""
    verdict, begins = _judge(path)
    for _ in range(_LOOKS_MAX):
        if verdict is None or not verdict.is_damaged:
            return verdict
        # What is written under our eyes may look damaged; damage is still there at the next look.
        before, begun = verdict, begins
        verdict, begins = _judge(path)
        if verdict is not None and (begins, verdict.frames) == (begun, before.frames):
            return verdict
    return None if verdict is None else verdict._replace(is_damaged=False)


def _judge(path: Path) -> tuple[Verdict | None, bytes]:
    try:
        with path.open("rb") as file:
            begins = file.read(_HEADER.size)
            header = _header(file, begins)
            return None if header is None else _weigh(header, file), begins
    except FileNotFoundError:
        return None, b""


def _weigh(header: _Header, file: BinaryIO) -> Verdict:
    """Frames behind those that SQLite reads may be left of one commit that was cut short: its fsync never returned.

    A whole frame behind a whole commit tells more: that commit was durable, and SQLite does not come to it.
    """
    frames = whole_end = 0
    passed_over = False
    is_damaged = False
    for number, frame in enumerate(_frames(header, file), 1):
        if frame.is_whole:
            is_damaged = is_damaged or passed_over or not header.is_whole
            if frame.commit:
                whole_end = number
                if frame.is_read:
                    frames = number
                else:
                    passed_over = True
    return Verdict(frames, whole_end, is_damaged)


def mend(path: Path, target: Path) -> None:
    """Write a WAL of all whole frames of `path`, up to the last whole commit, to `target`. Raises `OSError`."""
    verdict = judge(path)
    if verdict is None or not verdict.whole_end:
        return
    with path.open("rb") as file, target.open("wb") as mended:
        header = _header(file, file.read(_HEADER.size))
        if header is None:
            return
        begins = _HEADER.pack(_MAGIC, 3_007_000, header.page_bytes, 0, *header.salts, 0, 0)[:-8]
        told = _sum("little", (0, 0), begins)
        mended.write(begins + Struct(">2I").pack(*told))
        for number, frame in enumerate(_frames(header, file), 1):
            if frame.is_whole:
                told = _sum("little", told, Struct(">2I").pack(frame.page, frame.commit) + frame.content)
                mended.write(_FRAME.pack(frame.page, frame.commit, *header.salts, *told) + frame.content)
            if number == verdict.whole_end:
                break
        mended.flush()
        os.fsync(mended.fileno())


def _header(file: BinaryIO, begins: bytes) -> _Header | None:
    """None for an empty WAL."""
    if len(begins) < _HEADER.size:
        return None
    magic, _, page_bytes, _, *salts, sum_1, sum_2 = _HEADER.unpack(begins)
    order = "big" if magic == _MAGIC | 1 else "little"
    is_whole = magic | 1 == _MAGIC | 1 and _sum(order, (0, 0), begins[:-8]) == (sum_1, sum_2)
    if is_whole:
        return _Header(order, page_bytes, (salts[0], salts[1]), (sum_1, sum_2), is_whole)
    return _Header("little", _PAGE_BYTES, _salts(file), (sum_1, sum_2), is_whole)


def _salts(file: BinaryIO) -> tuple[int, int]:
    """What most of the first frames have; the file is left behind the header."""
    found: Counter[tuple[int, int]] = Counter()
    for _ in range(_SALTED_FRAMES):
        frame = file.read(_FRAME.size + _PAGE_BYTES)
        if len(frame) >= _FRAME.size:
            found[_FRAME.unpack_from(frame)[2:4]] += 1
    file.seek(_HEADER.size)
    return found.most_common(1)[0][0] if found else (0, 0)


def _frames(header: _Header, file: BinaryIO) -> Iterator[Frame]:
    """Every frame in its place, those of earlier times as not whole.

    A frame's checksum goes on from that of the frame before, so that a broken one still vouches for the next: by the
    checksum that it has or, where just that is broken, by the one that it should have.
    """
    stored = computed = header.sum
    before: Frame | None = None
    size = _FRAME.size + header.page_bytes
    while len(raw := file.read(size)) == size:
        page, commit, salt_1, salt_2, *sums = _FRAME.unpack_from(raw)
        told, content = (sums[0], sums[1]), raw[_FRAME.size :]
        is_salted = (salt_1, salt_2) == header.salts
        should, is_whole = told, False
        if page and (is_salted or before is None or before.is_whole):
            summed = raw[:_SUMMED_BYTES] + content
            should = _sum(header.order, stored, summed)
            is_whole = should == told
            if not is_whole and computed != stored and _sum(header.order, computed, summed) == told:
                should, is_whole = told, True
                before = None if before is None else before._replace(is_whole=True)
        is_read = is_whole and is_salted and (header.is_whole if before is None else before.is_read)
        if before is not None:
            yield before
        before = Frame(page, commit, content, is_whole, is_read)
        stored, computed = told, should
    if before is not None:
        yield before


def _sum(order: str, begin: Sum, content: bytes) -> Sum:
    words = array("I", content)
    if sys.byteorder != order:
        words.byteswap()
    one, two = begin
    pairs = iter(words)
    for first, second in zip(pairs, pairs, strict=True):
        one = (one + first + two) & _MASK
        two = (two + second + one) & _MASK
    return one, two
