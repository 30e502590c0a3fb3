"""Which form a client gets, and tables written in it. Left out: what each form looks like (its own module)."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from enum import Enum
from importlib import import_module
from typing import Any, Final, Literal

import orjson
from aiohttp import hdrs

from api.http.accepting import best_type
from api.http.operations import Reply
from api.http.problems import NOT_ACCEPTABLE, Problem
from api.readings.forms.comma import write_csv
from api.readings.forms.table import Table, gathered
from api.readings.forms.texts import write_columns, write_lines, write_rows

_CHUNK_BYTES: Final = 65_536
_HEADER: Final = "Sluice-"

#: What `format` may say.
FormName = Literal["json", "columns", "csv", "ndjson", "arrow"]


class Form(Enum):
    """A form, by the name that `format` has for it."""

    ROWS = "json"
    COLUMNS = "columns"
    CSV = "csv"
    NDJSON = "ndjson"
    ARROW = "arrow"

    @property
    def media_type(self) -> str:
        return _TYPES[self]


_TYPES: Final = {
    Form.ROWS: "application/json",
    Form.COLUMNS: "application/vnd.sluice.columns+json",
    Form.CSV: "text/csv",
    Form.NDJSON: "application/x-ndjson",
    Form.ARROW: "application/vnd.apache.arrow.stream",
}
#: What is said beside the type.
_PARAMETERS: Final = {Form.CSV: "; charset=utf-8; header=present"}
#: Which have the head in their body.
_WITH_HEAD: Final = (Form.ROWS, Form.COLUMNS)
_WRITERS: Final[Mapping[Form, Callable[[Table], AsyncIterator[bytes]]]] = {
    Form.ROWS: write_rows,
    Form.COLUMNS: write_columns,
    Form.CSV: write_csv,
    Form.NDJSON: write_lines,
}


def other_types(columns: Any) -> dict[str, Any]:
    """What an operation that answers in every form declares beside JSON by rows; `columns` is JSON by columns."""
    return {kind: columns if form is Form.COLUMNS else None for form, kind in _TYPES.items() if form is not Form.ROWS}


def form_of(accept: str, name: FormName | None, forms: Sequence[Form] = tuple(Form)) -> Form:
    """The form called `name`, or else what `Accept` wants most of `forms`; JSON by rows for whom any will do.

    Raises the problem of a client that takes none of them.
    """
    if name is not None:
        return Form(name)
    types = {form.media_type: form for form in forms}
    found = best_type(accept, list(types))
    if found is None:
        names = ", ".join(f"{kind} (format={form.value})" for kind, form in types.items())
        raise Problem(NOT_ACCEPTABLE, f"Accept: there is {names}")
    return types[found]


async def write(form: Form, table: Table) -> AsyncIterator[bytes]:
    """The body, piece by piece; at no time is more of it held than a block and a piece."""
    async with aclosing(gathered(await _writer(form, table), _CHUNK_BYTES)) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            yield chunk


async def _writer(form: Form, table: Table) -> AsyncIterator[bytes]:
    if form is not Form.ARROW:
        return _WRITERS[form](table)
    # Importing it takes a good part of a second, and tens of megabytes: for those alone who ask for it.
    arrow = await asyncio.to_thread(import_module, "api.readings.forms.arrow")
    found: AsyncIterator[bytes] = arrow.write_arrow(table)
    return found


async def whole(form: Form, table: Table) -> Reply[Any]:
    """An answer of a bounded table, as one body."""
    return _reply(form, table, b"".join([chunk async for chunk in write(form, table)]))


def streamed(form: Form, table: Table) -> Reply[Any]:
    """An answer piece by piece, as fast as the client reads it."""
    return _reply(form, table, write(form, table))


def _reply(form: Form, table: Table, content: bytes | AsyncIterator[bytes]) -> Reply[Any]:
    headers = {hdrs.VARY: hdrs.ACCEPT} | ({} if form in _WITH_HEAD else dict(head_lines(table.head)))
    return Reply(content, headers=headers, content_type=form.media_type + _PARAMETERS.get(form, ""))


def head_lines(head: Mapping[str, Any]) -> dict[str, str]:
    """The members of a head as headers; what is None is left out."""
    return {
        _HEADER + "-".join(part.capitalize() for part in name.split("_")): _line(value)
        for name, value in head.items()
        if value is not None
    }


def _line(value: Any) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    if isinstance(value, datetime):
        return orjson.dumps(value, option=orjson.OPT_UTC_Z).decode().strip('"')
    # Only ASCII may stand in a header: JSON has escapes for the rest.
    return json.dumps(orjson.loads(orjson.dumps(value, option=orjson.OPT_UTC_Z)))
