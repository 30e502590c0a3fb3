"""A file that a killed process left: damage to its WAL is always noticed, and nothing else is taken for damage."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from runtime.log import sqlite_wal
from runtime.log.sqlite_ends import told_ends
from runtime.log.sqlite_salvage import salvage
from runtime.log.sqlite_store import DamagedError, Store, create_store

PARTITIONS = 4
COMMITS = 60
HEADER_BYTES, FRAME_BYTES, PAGE_BYTES = 32, 24, 4_096

# Appends so many batches, tells of each once it is durable, and is killed.
WRITER = """
import os, signal, sys
from pathlib import Path
from runtime.log.sqlite_store import Store
from tests.unit.test_sqlite_wal import batch
store = Store(Path(sys.argv[1]))
ends = [0] * 4
for number in range(int(sys.argv[2])):
    bodies = batch(number, ends)
    for partition, first in store.append(bodies, 1.0).items():
        ends[partition] = first + len(bodies[partition])
print(*ends, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

# Forks writers, kills each at a random moment, and looks at what it left; in some the disk now and then refuses.
KILLER = """
import os, random, resource, signal, struct, sys, time
from pathlib import Path
from runtime.errors import SluiceError
from runtime.log import sqlite_store, sqlite_wal
from runtime.log.sqlite_store import Store
from tests.unit.test_sqlite_wal import PARTITIONS, body

path, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sqlite_store.CHECKPOINT_PAGES = 60
chance = random.Random(seed)
wal = path.with_name(path.name + "-wal")

def write(told, chance, breaks):
    store = Store(path)
    store.open()
    ends = ends_of(store)
    while True:
        size = chance.choice([1, 3, 30, 30, 300, 2_000])
        if breaks and chance.random() < 0.3:
            limit = chance.randrange(4_000, 200_000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        bodies = {partition: [body(partition, ends[partition] + more) for more in range(size)]
                  for partition in chance.sample(range(PARTITIONS), chance.randrange(1, PARTITIONS))}
        try:
            firsts = store.append(bodies, 1.0)
        except SluiceError:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.write(told, struct.pack("<4Q", *[0] * PARTITIONS))
            ends = ends_of(store)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            for partition, first in firsts.items():
                ends[partition] = first + len(bodies[partition])
            os.write(told, struct.pack("<4Q", *ends))

def ends_of(store):
    return [bounds.end for _, bounds in sorted(store.bounds().items())]

begins, acknowledged, left, refused = [0] * PARTITIONS, [0] * PARTITIONS, 0, 0
for number in range(rounds):
    hearing, telling = os.pipe()
    child = os.fork()
    if not child:
        write(telling, random.Random(chance.random()), breaks=number % 2)
    os.close(telling)
    time.sleep(chance.uniform(0.0, 0.03))
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9, number
    heard = b"".join(iter(lambda: os.read(hearing, 1 << 16), b""))
    os.close(hearing)
    for told in struct.iter_unpack("<4Q", heard):
        refused += not any(told)
        acknowledged = [max(pair) for pair in zip(acknowledged, told)]
    left += wal.exists() and wal.stat().st_size > 0
    if chance.random() < 0.5 and number < rounds - 1:
        continue  # the next one goes on with what this one left
    store = Store(path)
    store.open()
    ends = ends_of(store)
    assert all(end >= kept for end, kept in zip(ends, acknowledged)), (number, ends, acknowledged)
    for partition, begin in enumerate(begins):
        for position in range(begin, ends[partition], 211):
            assert store.read_on(partition, position, 1).bodies[0] == body(partition, position), number
    begins = ends
    store.prune(dict(enumerate(ends)), 1.0)
    store.close()
print(left, refused)
"""


def body(partition: int, position: int) -> bytes:
    return b"%d/%d " % (partition, position) * (1 + position % 40)


def batch(number: int, ends: list[int]) -> dict[int, list[bytes]]:
    """Something for each partition, from where it ends."""
    return {
        partition: [body(partition, end + more) for more in range(1 + number % 7)]
        for partition, end in enumerate(ends)
        if partition <= number % PARTITIONS
    }


def ask(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True, check=False)


class Left:
    """What a killed process left, and how far it was told that its partitions were kept."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "left.db"
        create_store(self.path, uuid4(), PARTITIONS)
        done = ask(WRITER, self.path, COMMITS)
        assert done.returncode == -signal.SIGKILL
        self.ends = [int(end) for end in done.stdout.split()]

    def copy(self, directory: Path) -> Path:
        for ending in ("", "-wal", "-ends"):
            shutil.copy(f"{self.path}{ending}", directory / f"copy.db{ending}")
        return directory / "copy.db"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return Left(tmp_path_factory.mktemp("left"))


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def flip(path: Path, at: int, count: int = 8) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        found = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0x5A for byte in found))


def frames_of(path: Path) -> int:
    return (wal_of(path).stat().st_size - HEADER_BYTES) // (FRAME_BYTES + PAGE_BYTES)


def place(frame: int, offset: int) -> int:
    return HEADER_BYTES + frame * (FRAME_BYTES + PAGE_BYTES) + offset


REGIONS = {
    "page number": 0,
    "commit mark": 4,
    "salts": 8,
    "checksum": 16,
    "into the page": 20,
    "head of the page": 24,
    "within the page": 2_000,
    "end of the page": 4_112,
}


def salvaged(path: Path) -> tuple[Store, int]:
    """What is saved of it, checked record by record, and how many are missing."""
    target = path.with_name("saved.db")
    target.unlink(missing_ok=True)
    before = {name: name.read_bytes() for name in path.parent.glob("copy.db*")}
    salvage(path, target, uuid4(), PARTITIONS)
    assert {name: name.read_bytes() for name in path.parent.glob("copy.db*")} == before  # evidence stays as it was
    store = Store(target)
    store.open()
    missing = 0
    for partition, (start, end) in store.bounds().items():
        position = start
        while position < end:
            part = store.read_on(partition, position, 1)
            missing += (part.first if part.bodies else end) - position
            position = part.first
            for found in part.bodies:
                assert found == body(partition, position)
                position += 1
    return store, missing


def test_a_wal_that_nobody_harmed_is_read_to_its_end(left: Left, tmp_path: Path) -> None:
    path = left.copy(tmp_path)
    verdict = sqlite_wal.judge(wal_of(path))
    assert verdict is not None
    assert verdict == (frames_of(path), frames_of(path), False)
    assert told_ends(path) == dict(enumerate(left.ends))
    _, missing = salvaged(path)
    assert missing == 0
    store = Store(path)
    store.open()
    assert [bounds.end for bounds in store.bounds().values()] == left.ends


@pytest.mark.parametrize("at", range(0, HEADER_BYTES - 7, 4))
@pytest.mark.parametrize("is_told", [True, False])
def test_damage_to_the_header_is_noticed_and_costs_next_to_nothing(
    left: Left, tmp_path: Path, at: int, is_told: bool
) -> None:
    path = left.copy(tmp_path)
    flip(wal_of(path), at)
    if not is_told:
        path.with_name("copy.db-ends").unlink()
    with pytest.raises(DamagedError, match="damaged"):
        Store(path).open()
    store, missing = salvaged(path)
    assert [bounds.end for bounds in store.bounds().values()] == left.ends
    assert missing < 60


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_damage_to_a_frame_is_noticed_and_what_stands_behind_it_saved(
    left: Left, tmp_path: Path, region: str, share: float
) -> None:
    path = left.copy(tmp_path)
    frame = int((frames_of(path) - 1) * share)
    flip(wal_of(path), place(frame, REGIONS[region]))
    with pytest.raises(DamagedError):
        Store(path).open()
    assert wal_of(path).stat().st_size > 0  # not for SQLite to drop
    store, missing = salvaged(path)
    assert [bounds.end for bounds in store.bounds().values()] == left.ends
    assert missing < 60


@pytest.mark.parametrize("region", REGIONS)
def test_damage_before_the_last_commits_is_noticed_without_told_ends(left: Left, tmp_path: Path, region: str) -> None:
    path = left.copy(tmp_path)
    path.with_name("copy.db-ends").unlink()
    flip(wal_of(path), place(frames_of(path) // 2, REGIONS[region]))
    with pytest.raises(DamagedError, match="pass over"):
        Store(path).open()


@pytest.mark.parametrize("harm", ["cut off", "zeroed", "nonsense"])
def test_a_wal_that_is_gone_or_ends_early_is_noticed(left: Left, tmp_path: Path, harm: str) -> None:
    path = left.copy(tmp_path)
    if harm == "cut off":
        os.truncate(wal_of(path), place(frames_of(path) // 2, 100))
    else:
        size = wal_of(path).stat().st_size
        wal_of(path).write_bytes(bytes(size) if harm == "zeroed" else os.urandom(size))
    with pytest.raises(DamagedError, match="lost records that were acknowledged"):
        Store(path).open()
    store, missing = salvaged(path)
    assert [bounds.end for bounds in store.bounds().values()] == left.ends
    assert missing > 0


def test_a_last_commit_that_a_power_cut_tore_is_no_damage(left: Left, tmp_path: Path) -> None:
    """Its frames reached the disk in any order, its fsync never returned; what was told was told of those before."""
    path = left.copy(tmp_path)
    verdict = sqlite_wal.judge(wal_of(path))
    assert verdict is not None
    commits = [
        number
        for number in range(verdict.frames)
        if wal_of(path).read_bytes()[place(number, 4) : place(number, 8)] != bytes(4)
    ]
    first, last = commits[-2] + 1, commits[-1]
    assert last - first >= 2
    path.with_name("copy.db-ends").unlink()
    whole = wal_of(path).read_bytes()
    for frame in range(first, last + 1):
        for begin, end in ((0, 12), (16, 1_000), (0, FRAME_BYTES + PAGE_BYTES)):
            wal_of(path).write_bytes(whole)
            with wal_of(path).open("r+b") as file:
                file.seek(place(frame, begin))
                file.write(bytes(end - begin))
            verdict = sqlite_wal.judge(wal_of(path))
            assert verdict is not None
            assert not verdict.is_damaged
            assert verdict.frames == first


def test_hundreds_of_killed_writers_leave_nothing_that_is_taken_for_damage(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    create_store(path, uuid4(), PARTITIONS)
    seed = random.randrange(1 << 30)
    done = ask(KILLER, path, 200, seed)
    assert done.returncode == 0, seed
    left, refused = map(int, done.stdout.split())
    assert left > 40  # most kills hit a writer at work; on a busy machine fewer
    assert refused > 0
