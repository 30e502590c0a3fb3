"""Tables of any columns in every form: cells of each kind, cells without anything, and what is said beside them."""

import asyncio
import csv
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from api.http.operations import Reply
from api.readings.forms.answers import Form, streamed, whole
from api.readings.forms.table import Block, Column, Kind, Table, each, micros
from api.readings.series import Series

SERIES = Series("01a1fc35-2541-757a-960f-61e37ea28410", "energy", "", "Wh")
COLUMNS = (
    Column("bucket", Kind.TIME),
    Column("count", Kind.INTEGER),
    Column("mean", Kind.NUMBER),
    Column("source", Kind.TEXT),
    Column("last_ts", Kind.TIME),
)
T0 = datetime(2026, 11, 2, 0, 0, 0, 1, UTC)
ROWS = [(T0, 3, 0.5, "=raw", T0), (T0, 2**60, None, None, None)]
HEAD = {"next_cursor": None, "complete_through": T0, "dirty": False, "source": "5m", "gaps": ["ü"]}


def table(*, as_numbers: bool, blocks: int) -> Table:
    """The same rows in one block or in one each; times as they come, or as numbers already."""
    found = []
    for start in range(0, len(ROWS), len(ROWS) // blocks):
        columns: list[Any] = [list(column) for column in zip(*ROWS[start : start + len(ROWS) // blocks], strict=True)]
        if as_numbers:
            columns[0] = [micros(ts) for ts in columns[0]]
            columns[4] = [None if ts is None else micros(ts) for ts in columns[4]]
        found.append(Block(SERIES, columns))
    return Table(COLUMNS, each(found), HEAD)


def answer(form: Form, made: Table) -> Reply[Any]:
    return asyncio.run(whole(form, made))


def content(form: Form, made: Table) -> bytes:
    found = answer(form, made).content
    assert isinstance(found, bytes)
    return found


@pytest.mark.parametrize("as_numbers", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_cells_of_every_kind_and_none_in_every_form(blocks: int, *, as_numbers: bool) -> None:
    def made() -> Table:
        return table(as_numbers=as_numbers, blocks=blocks)

    text = "2026-11-02T00:00:00.000001Z"
    first = {"bucket": text, "count": 3, "mean": 0.5, "source": "=raw", "last_ts": text}
    second = {"bucket": text, "count": 2**60, "mean": None, "source": None, "last_ts": None}
    objects = [{**SERIES._asdict(), **one} for one in (first, second)]
    by_rows = json.loads(content(Form.ROWS, made()))
    assert by_rows == {"data": objects, **HEAD, "complete_through": text}
    assert [json.loads(line) for line in content(Form.NDJSON, made()).splitlines()] == objects
    entries = json.loads(content(Form.COLUMNS, made()))["series"]
    assert len(entries) == blocks
    assert [ts for one in entries for ts in one["last_ts"]] == [micros(T0), None]
    assert [count for one in entries for count in one["count"]] == [3, 2**60]
    lines = list(csv.DictReader(io.StringIO(content(Form.CSV, made()).decode(), newline="")))
    assert [list(line.values())[4:] for line in lines] == [
        [text, "3", "0.5", "'=raw", text],
        [text, str(2**60), "", "", ""],
    ]
    with pa.ipc.open_stream(content(Form.ARROW, made())) as stream:
        assert stream.read_all().to_pylist() == [
            {**SERIES._asdict(), **dict(zip((column.name for column in COLUMNS), row, strict=True))} for row in ROWS
        ]


def test_what_is_said_beside_the_rows_is_a_header_where_the_body_has_no_place() -> None:
    expected = {
        "Vary": "Accept",
        "Sluice-Complete-Through": "2026-11-02T00:00:00.000001Z",
        "Sluice-Dirty": "false",
        "Sluice-Source": "5m",
        "Sluice-Gaps": '["\\u00fc"]',
    }
    for form in Form:
        headers: Mapping[str, str] = answer(form, table(as_numbers=True, blocks=1)).headers
        assert headers == (expected if form in {Form.CSV, Form.NDJSON, Form.ARROW} else {"Vary": "Accept"})
        assert streamed(form, table(as_numbers=True, blocks=1)).headers == headers
