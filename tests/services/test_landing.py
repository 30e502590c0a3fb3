"""Landing on a real database and a real log: what is stored, and that the books add up."""

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.databases import Database
from tests.landing_rig import NOW, SECOND, Rig, channel, open_rig, record, sqlite_url
from tests.support import run


def test_readings_land_with_their_exact_values(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            values = [0.1, -1.5, 1e308, 5e-324, 0.0]
            power = [(NOW - 10 * SECOND + at, value) for at, value in enumerate(values)]
            state = [(NOW, 1.0)]
            await rig.land(
                record(device, channel("power", power, label="L1"), channel("on", state, unit="", quality=16))
            )
            expected = [("on", "", NOW, 1.0, 16), *(("power", "L1", time, value, 0) for time, value in power)]
            assert await rig.readings() == expected
            assert await rig.ledger() == (6, 6, 0, 0, 0)

    run(test())
