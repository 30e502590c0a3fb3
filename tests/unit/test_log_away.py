"""A log whose file is damaged, one that is opened late, and what readiness says of it."""

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from runtime.errors import ConfigurationError, UnavailableError
from runtime.health import Health
from runtime.log import Expected, LateLog, Log, LogSettings, create_log, open_log
from tests.landing_rig import until
from tests.support import run


async def make(directory: Path) -> tuple[LogSettings, Expected]:
    settings, source = LogSettings(log_url=f"sqlite:///{directory}", log_linger_ms=0), uuid4()
    identity = await create_log(settings, source=source, name="log", partitions=2)
    return settings, Expected(source, "log", identity, 2)


def test_a_reader_that_meets_a_damaged_chunk_stops_there_and_says_where(tmp_path: Path) -> None:
    async def test() -> None:
        settings, expected = await make(tmp_path)
        log = await open_log(settings, expected, client_id="test")
        for number in range(10):
            await log.append(1, b"the record number %d" % number)
        await log.close()
        path = tmp_path / "log.db"
        path.write_bytes(path.read_bytes().replace(b"record number 7", b"RECORD NUMBER 7"))
        log = await open_log(settings, expected, client_id="test")
        reader = log.reader()
        await reader.assign({1: 8})
        assert [part.first for part in await reader.read(bytes_max=100, wait_s=1.0)] == [8]
        await reader.assign({1: 0})
        assert await reader.read(bytes_max=1_000_000, wait_s=0.1) == []
        assert "partition 1: the records from 7 to 7 are not what was written" in str(log.trouble)
        assert str(path) in str(log.trouble)
        await log.close()

    run(test())


def test_a_late_log_is_unavailable_until_it_is_open_and_then_the_log_itself(tmp_path: Path) -> None:
    async def test() -> None:
        settings, expected = await make(tmp_path)
        late, there = LateLog(settings, expected, "nobody answers"), False

        async def attempt() -> Log:
            if not there:
                raise UnavailableError("still not")
            return await open_log(settings, expected, client_id="test")

        opening = asyncio.create_task(late.keep_opening(attempt))
        for append in (late.append(0, b"one"), late.append_all(0, [b"two"])):
            with pytest.raises(UnavailableError, match="nobody answers"):
                await append
        with pytest.raises(UnavailableError, match="nobody answers"):
            await late.bounds()
        there = True

        async def opened() -> bool:
            return late.trouble is None

        await until(opened)
        assert (await late.append(0, b"one"), await late.append_all(0, [b"two", b"three"])) == (0, 1)
        assert (await late.bounds())[0].end == 3
        opening.cancel()
        await late.close()

    run(test())


def test_a_late_log_of_another_generation_ends_the_process(tmp_path: Path) -> None:
    async def test() -> None:
        settings, expected = await make(tmp_path)
        late = LateLog(settings, expected._replace(source=uuid4()), "nobody answers")
        with pytest.raises(ConfigurationError, match="was closed"):
            await late.keep_opening(lambda: open_log(settings, expected, client_id="test"))

    run(test())


def test_a_note_is_shown_and_makes_nothing_unready() -> None:
    health = Health()
    text: str | None = None
    health.note("spool", lambda: text)
    assert (health.notes(), health.not_ready()) == ({}, {})
    text = "17 records wait"
    assert (health.notes(), health.not_ready()) == ({"spool": "17 records wait"}, {})
