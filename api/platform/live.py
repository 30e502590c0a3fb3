"""Readings as they land, as an operation. Left out: how the log is followed (`api.live`)."""

from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.problems import OVERLOADED, RATE_LIMITED, invalid_parameter, unavailable
from api.http.spelt import STORABLE
from api.live.hub import LIVE_UNAVAILABLE, Live
from api.live.settings import LiveSettings
from api.live.watches import resolve
from api.platform.readings import MISSING, Selected
from api.readings.series import find
from api.settings import ApiSettings

LISTENS: Final = needs(Role.VIEWER, READINGS_READ)
EVENT_STREAM: Final = "text/event-stream"
#: `no` to proxies that gather an answer before they pass it on (nginx).
_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

EventId = Annotated[
    str,
    msgspec.Meta(
        max_length=16_384,
        description="The id of the last event that came, for who cannot send it as `Last-Event-ID`.",
        extra_json_schema=STORABLE,
    ),
]


class Listening(Selected, kw_only=True):
    """Whose readings, and after which event."""

    last_event_id: EventId | None = None


class LiveOperations:
    """`live` is None where there is no log to read."""

    def __init__(self, live: Live | None, settings: ApiSettings, limits: LiveSettings) -> None:
        self._live = live
        self._settings = settings
        self._limits = limits

    @operation(
        PLATFORM,
        "GET",
        "/api/v1/readings/stream",
        LISTENS,
        problems=[*MISSING, RATE_LIMITED, OVERLOADED, LIVE_UNAVAILABLE],
        content_type=EVENT_STREAM,
    )
    async def stream_readings(self, call: Call[Nothing, Listening, Nothing]) -> Reply[str]:
        """Readings as they land, as Server-Sent Events

        Of a device, of what stands at a site while it does, of a group's devices, or of one series. `readings`
        carries an array of readings as `GET /api/v1/readings` gives them; `position` comes first; `gap` says that
        some cannot be told of any more, and since when to query for them; `end` says why the stream ends. Each has
        an id: with the last one as `Last-Event-ID`, or as `last_event_id`, the stream goes on right after it.
        """
        wanted, now = call.query.series, datetime.now(UTC)
        await find(call.connection, wanted, now, None, self._settings.api_page_series_max, is_awaited=True)
        if self._live is None:
            raise unavailable(LIVE_UNAVAILABLE, "no log is read here: query readings instead")
        sent = call.query.last_event_id or call.last_event_id
        mark = self._live.ids.take(sent) if sent else None
        (members,) = await resolve(call.connection, [wanted], self._limits.live_devices_max)
        if members is None or len(members.devices) > self._limits.live_devices_max:
            raise invalid_parameter("device_id", f"more than {self._limits.live_devices_max} devices: name fewer")
        self._live.check_room(call.organisation, members)
        chunks = self._live.listen(call.caller, wanted, members, mark, call.is_gone)
        return Reply(chunks, headers=_HEADERS)
