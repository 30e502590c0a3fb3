"""What schemathesis cannot know: ids that exist, secrets that are good, and which session must live on.

Requests whose path, query or body is meant to be right get them; what is meant to be wrong stays as it is. What an
operation takes away is made for it first. Left out: what is checked (`schemathesis.toml`).
"""

import atexit
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlencode
from uuid import UUID

import schemathesis
from schemathesis.core.parameters import ParameterLocation as In

from tests.certificate_rig import request_for
from tests.support import ask
from tests.system.conformance import STAGE, STATUSES, call, secret_of

_stage: Final[dict[str, Any]] = json.loads(os.environ[STAGE])
_number: Final = itertools.count(1)
_statuses: Final[defaultdict[str, Counter[int]]] = defaultdict(Counter)
_ORGANISATION: Final = f"/api/v1/organisations/{_stage['organisation']}"
_REGISTRATION: Final = "/api/v1/devices/registration/tokens"
_REQUEST: Final = request_for()
_SITES: Final = f"/api/organisations/{_stage['organisation']}/sites"
#: One request in so many keeps ids that nobody has.
_STRANGE_EVERY: Final = 8
_FUTURE: Final = "2999-01-01T00:00:00Z"
_PAST: Final = "2020-01-01T00:00:00Z"


def _ask(method: str, path: str, body: object = None, token: str | None = None) -> Any:
    return call(_stage["url"], token or _stage["token"], method, path, body)


# ---------------------------------------------------------------- what is made to be taken away


def _site() -> str:
    return str(_ask("POST", _SITES, {"name": f"Site {next(_number)}"})["id"])


@cache
def _erased() -> str:
    site = _site()
    _ask("DELETE", f"{_SITES}/{site}")
    return site


def _placed_site() -> str:
    body = {"name": f"Site {next(_number)}", "location": {"latitude": -32.35, "longitude": 150.87}}
    return str(_ask("POST", _SITES, body)["id"])


def _with_server() -> str:
    site = _site()
    _ask("POST", f"{_SITES}/{site}/register-server", {"hardwareId": "h", "version": "1", "hostname": "h.local"})
    return site


def _edge() -> str:
    edge = f"edge-{next(_number)}"
    _ask("POST", f"{_SITES}/{_stage['site']}/register-edge", {"edgeId": edge, "hardwareId": "h", "version": "1"})
    return edge


def _device() -> str:
    body = {"local_id": f"device-{next(_number)}", "name": "Device", "model": "diy_esp32"}
    return str(_ask("POST", "/v1/devices", body)["id"])


def _plain_device() -> str:
    """Its id as the platform face spells it."""
    return str(UUID(_device().removeprefix("dev_")))


@cache
def _command() -> str:
    """One of the device that `{id}` stands for beside it."""
    made = _ask("POST", f"/api/v1/devices/{_stage['device_uuid']}/commands", {"command": "reboot"})
    return str(made["command_id"])


def _serial_number() -> str:
    return f"SN-{next(_number)}"


def _plant(*steps: str) -> Callable[[], str]:
    """Plants that have gone these steps."""

    def make() -> str:
        body = {"name": "Plant", "serialNumber": _serial_number(), "type": "SENSOR"}
        plant = str(_ask("POST", "/api/v1/plants", body)["id"])
        for step in steps:
            _ask("POST", f"/api/v1/plants/{plant}/{step}")
        return plant

    return make


def _group() -> str:
    return str(_ask("POST", "/api/v1/device-groups", {"name": f"Group {next(_number)}"})["group_id"])


def _key() -> str:
    body = {"name": "Key", "scopes": ["devices:read"]}
    return str(_ask("POST", "/api/v1/api-keys", body)["credential_id"])


def _invitation() -> dict[str, Any]:
    body = {"email": f"new-{next(_number)}@example.org", "role": "viewer"}
    return dict(_ask("POST", f"{_ORGANISATION}/invitations", body))


def _newcomer() -> dict[str, Any]:
    """Somebody who has just joined: his tokens."""
    body = {"token": secret_of(_invitation()), "password": _stage["password"], "name": "New"}
    return dict(_ask("POST", "/api/v1/invitations/accept", body))


def _member() -> str:
    return str(_newcomer()["user_id"])


def _login() -> dict[str, Any]:
    """Another session of a guest's, who has only so many: its tokens."""
    return dict(_ask("POST", "/api/v1/auth/login", {"email": _stage["guest"], "password": _stage["password"]}))


def _own_session() -> str:
    """The token of a session, which may be ended with it."""
    token = str(_login()["access_token"])
    _stage["session"] = _ask("GET", "/api/v1/auth/me", token=token)["session_id"]
    return token


def _registration() -> str:
    body = {"deviceName": f"Box {next(_number)}"}
    return str(_ask("POST", _REGISTRATION, body)["token"])


def _receipt() -> str:
    body = {"measurements": [{"type": "temperature", "value": next(_number) % 40}]}
    return str(call(_stage["url"], _stage["device_token"], "POST", "/v1/ingest", body)["receipt"])


def _held() -> str:
    """One of the rows in quarantine, each in turn."""
    row = _stage["held"].pop(0)
    _stage["held"].append(row)
    return str(row)


def _in_tray() -> str:
    """One that nobody has claimed, each in turn."""
    one = _stage["unassigned"].pop(0)
    _stage["unassigned"].append(one)
    return str(one)


def _with_mqtt() -> str:
    site = _site()
    _ask("POST", f"{_SITES}/{site}/mqtt/password")
    return site


# ---------------------------------------------------------------- where it goes

_Supply = Callable[[], str]


def _known(name: str) -> _Supply:
    return lambda: str(_stage[name])


_IDS: Final[dict[str, _Supply]] = {
    "orgId": _known("organisation"),
    "siteId": _known("site"),
    "edgeId": _edge,
    "userId": _known("member"),
    "invitationId": lambda: str(_invitation()["invitation_id"]),
    "deviceId": _known("device_uuid"),
    "commandId": _command,
    "receipt": _receipt,
    "token": _known("device_token"),
    "name": lambda: str(_stage["schemas"][next(_number) % len(_stage["schemas"])]),
}
#: `{id}` by what is before it in the path.
_ID: Final[dict[str, _Supply]] = {
    "/v1/devices/": _known("device"),
    "/api/v1/devices/": _known("device_uuid"),
    "/api/v1/device-groups/": _known("group"),
    "/api/v1/api-keys/": _key,
    "/api/v1/auth/sessions/": _known("session"),
    "/api/v1/admin/quarantine/": _held,
    "/api/v1/erasures/": _erased,
    "/api/v1/device-templates/": _known("template"),
    "/api/v1/plants/": _known("plant"),
    "/api/v1/unassigned-devices/": _in_tray,
}
_SITE: Final = "/api/organisations/{orgId}/sites/{siteId}"
_PLANT: Final = "/api/v1/plants/{id}"
#: What a plant's state has to be, whoever made it.
_STATES: Final[dict[str, dict[str, _Supply]]] = {
    f"PATCH {_PLANT}": {"id": _plant()},
    f"POST {_PLANT}/provision": {"id": _plant()},
    f"GET {_PLANT}/provision/download": {"id": _known("plant")},
    f"POST {_PLANT}/mqtt-token": {"id": _known("token_plant")},
    f"POST {_PLANT}/rotate-secret": {"id": _known("plant")},
    f"POST {_PLANT}/suspend": {"id": _plant("provision")},
    f"POST {_PLANT}/reactivate": {"id": _plant("provision", "suspend")},
    f"POST {_PLANT}/revoke": {"id": _plant()},
    f"POST {_PLANT}/commands": {"id": _plant("provision")},
}
#: By operation, what it takes away, may have but once, or has to find in a certain state.
_TAKEN: Final[dict[str, dict[str, _Supply]]] = {
    f"DELETE {_SITE}": {"siteId": _site},
    f"DELETE {_SITE}/server": {"siteId": _with_server},
    f"POST {_SITE}/register-server": {"siteId": _site},
    f"GET {_SITE}/mqtt": {"siteId": _with_mqtt},
    f"PATCH {_SITE}/mqtt": {"siteId": _with_mqtt},
    f"DELETE {_SITE}/mqtt/password": {"siteId": _with_mqtt},
    f"PUT {_SITE}": {"siteId": _placed_site},
    "DELETE /v1/devices/{id}": {"id": _device},
    f"DELETE {_PLANT}": {"id": _plant()},
    **_STATES,
    "POST /v1/devices/{id}/rotate-token": {"id": _device},
    "POST /api/v1/devices/{id}/commands": {"id": _plain_device},
    "DELETE /api/v1/device-groups/{id}": {"id": _group},
    "DELETE /api/v1/organisations/{orgId}/members/{userId}": {"userId": _member},
}
_QUERY: Final[dict[str, _Supply]] = {
    "site_id": _known("site"),
    "account_id": _known("organisation"),
    "device_id": _known("device_uuid"),
    "group_id": _known("group"),
    "plantId": _known("plant"),
    "code": lambda: "unknown_unit",
    "device": lambda: "fridge",
    "token": _known("device_token"),
    "temp": lambda: "4.2",
}
_WHOSE: Final = frozenset({"device_id", "site_id", "group_id"})
_DAY: Final = {"from": "2026-11-01T00:00:00Z", "to": "2026-11-02T00:00:00Z"}
#: What is asked of readings that are put together: their values bound each other.
_PUT_TOGETHER: Final = {"bucket": "1h", "fn": "mean,delta,p95", "tz": "Europe/Prague"}
_OF_SPANS: Final = ("GET /api/v1/readings/aggregated", "GET /api/v1/readings/stats", "GET /api/v1/telemetry")
#: One of several parameters is needed, which no OpenAPI document can say.
_NEEDED: Final[dict[str, tuple[str, frozenset[str]]]] = {
    "GET /api/v1/readings": ("device_id", _WHOSE),
    "GET /api/v1/readings/latest": ("device_id", _WHOSE),
    "GET /api/v1/readings/series": ("device_id", _WHOSE),
    "GET /api/v1/readings/aggregated": ("device_id", _WHOSE),
    "GET /api/v1/readings/stats": ("device_id", _WHOSE),
    "GET /v1/devices": ("account_id", frozenset({"account_id", "site_id"})),
    "GET /v1/ingest": ("temp", frozenset({"temp"})),
    "GET /v1/ingest/shelly/{token}": ("temp", frozenset({"temp"})),
    "POST /api/v1/admin/quarantine/discard": (
        "code",
        frozenset({"code", "device_id", "request_id", "attempts_max", "from", "to"}),
    ),
}
#: Of lists whose bound is a setting.
_LIMIT_MAX: Final = 100
#: Objects of a client's own.
_OPEN: Final = frozenset({"metadata", "payload"})
_BODY: Final[dict[str, _Supply]] = {
    "organisation_id": _known("organisation"),
    "site_id": _known("site"),
    "to_site_id": _known("site"),
    "device": lambda: "fridge",
    "templateId": _known("template"),
}


def _reset(body: dict[str, Any]) -> None:
    if _stage["resets"]:
        body["token"] = _stage["resets"].pop()


def _one_device(body: dict[str, Any]) -> None:
    """One of the two."""
    if body.get("deviceName") is not None:
        body.pop("deviceId", None)
    else:
        body["deviceId"] = _stage["device_uuid"]


def _new_or_there(body: dict[str, Any]) -> None:
    """What a new device is called is nothing of one that is there."""
    if body.get("device_id") is not None:
        for name in ("name", "model"):
            body.pop(name, None)


#: What a body of the operation needs besides, so that it may be done.
_SECRETS: Final[dict[str, Callable[[dict[str, Any]], object]]] = {
    "POST /api/v1/auth/login": lambda body: body.update(email=_stage["guest"], password=_stage["password"]),
    "POST /api/v1/auth/refresh": lambda body: body.update(refresh_token=_login()["refresh_token"]),
    "POST /api/v1/auth/password/reset": _reset,
    "POST /api/v1/auth/password/change": lambda body: body.update(current_password=_stage["password"]),
    "POST /api/v1/invitations/accept": lambda body: body.update(
        token=secret_of(_invitation()), password=_stage["password"], name="New"
    ),
    "POST /api/v1/devices/provision": lambda body: body.update(token=_registration(), csr=_REQUEST),
    f"POST {_REGISTRATION}": _one_device,
    "POST /api/v1/unassigned-devices/{id}/claim": _new_or_there,
}
#: With whose token, where it is not the owner's: what ends a session or changes a password gets one of its own.
_TOKENS: Final[dict[str, _Supply]] = {
    "DELETE /api/v1/auth/sessions/{id}": _own_session,
    "POST /api/v1/auth/logout": lambda: str(_login()["access_token"]),
    "POST /api/v1/auth/password/change": lambda: str(_newcomer()["access_token"]),
    f"POST {_SITE}/heartbeat": _known("gateway"),
}


def _plain(identity: str) -> str:
    """An id in whichever way it is spelt."""
    return identity.removeprefix("dev_").replace("-", "")


#: What has to stay, and what is made to be taken away or changed in its place.
_STAYS: Final[dict[str, _Supply]] = {
    _plain(_stage[name]): supply
    for name, supply in (
        ("owner_id", _member),
        ("site", _site),
        ("device", _device),
        ("group", _group),
        ("plant", _plant()),
        ("token_plant", _plant()),
    )
}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    operation = case.operation.label
    if case.meta is None or case.method.upper() != case.operation.method.upper():
        return
    if operation in _TOKENS and (case.headers or {}).get("Authorization") == f"Bearer {_stage['token']}":
        case.headers["Authorization"] = f"Bearer {_TOKENS[operation]()}"
    _keep(case)
    # An id out of another answer is no part that was generated, and is of a plant in any state.
    if operation in _STATES and (In.PATH not in case.meta.components or _is_right(case, In.PATH)):
        case.path_parameters["id"] = _STATES[operation]["id"]()
    # A chain of operations has ids of its own.
    if case.meta.phase.name.value != "stateful" and next(_number) % _STRANGE_EVERY:
        _fill(case, In.PATH, case.path_parameters, _path_supplies(operation, case.operation.path))
        _fill(case, In.QUERY, case.query, {} if "quarantine" in operation else _QUERY)
        _fill(case, In.BODY, case.body, _BODY)
    _complete(operation, case)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    if case.method.upper() == case.operation.method.upper():
        _statuses[case.operation.label][response.status_code] += 1


@atexit.register
def _tell() -> None:
    Path(os.environ[STATUSES]).write_text(json.dumps(_statuses))


def _complete(operation: str, case: Any) -> None:
    """What a right request has besides, that its schema cannot say."""
    case.query = case.query or {}
    if _is_right(case, In.QUERY) or In.QUERY not in case.meta.components:
        _complete_query(operation, case, case.query)
    if _is_right(case, In.HEADER) and "If-Match" in (case.headers or {}):
        case.headers["If-Match"] = "*"
    if _is_right(case, In.HEADER) and "X-Device-Id" in (case.headers or {}):
        case.headers["X-Device-Id"] = "fridge"
    if _is_right(case, In.BODY) and isinstance(case.body, dict):
        _complete_body(operation, case.body)


def _complete_query(operation: str, case: Any, query: dict[str, Any]) -> None:
    name, enough = _NEEDED.get(operation, ("", query.keys()))
    if not enough & query.keys() and name:
        query[name] = _QUERY[name]()
    if "limit" in query:
        query["limit"] = min(int(query["limit"]), _LIMIT_MAX)
    if "from" in query and "to" in query:
        query["from"], query["to"] = "2000-01-01T00:00:00Z", _FUTURE
    if operation in _OF_SPANS:
        query.update(_DAY, **{name: value for name, value in _PUT_TOGETHER.items() if name in query})
    if operation == "GET /v1/measurements" and "channels" in query:
        query["channels"] = f"{_stage['device']}:temperature"
    if query.get("agg", "raw") != "raw":
        query.update(_DAY)
    if "/readings" in operation:
        query.pop("series_id", None)  # there is none: nothing was sent
    if "cursor" in query:
        _lead_on(case)


def _without_nul(value: Any) -> Any:
    """What nobody can say of texts at any depth."""
    if isinstance(value, dict):
        return {_without_nul(name): _without_nul(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nul(one) for one in value]
    return value.replace("\0", "") if isinstance(value, str) else value


def _complete_body(operation: str, body: dict[str, Any]) -> None:
    if body.get("expires_at") is not None:
        body["expires_at"] = _FUTURE
    if body.get("effective_at") is not None:
        body["effective_at"] = _PAST
    if body.get("templateId") is not None:
        body["templateId"] = _stage["template"]
    for name in _OPEN & body.keys():
        body[name] = _without_nul(body[name])
    if "serialNumber" in body:
        body["serialNumber"] = _serial_number()
    if operation in _SECRETS:
        _SECRETS[operation](body)
    if operation == "POST /api/v1/readings/batch":
        questions = [one for one in body.get("queries", []) if isinstance(one, dict)][:_LIMIT_MAX]
        body["queries"] = [one | _DAY | _PUT_TOGETHER for one in questions] or [dict(_DAY)]


def _lead_on(case: Any) -> None:
    """A cursor is good for the list that it was given out for, so ask for one; without, the list has one page."""
    del case.query["cursor"]
    plain = {name: value for name, value in case.query.items() if name != "format"}
    url = f"{case.formatted_path}?{urlencode({**plain, 'limit': 1})}"
    page = ask(f"{_stage['url']}{url}", token=_stage["token"])
    found = page.json() if page.status == 200 else {}
    if cursor := found.get("next_cursor") or found.get("nextCursor"):
        case.query["cursor"] = cursor
        case.query.setdefault("limit", 1)  # without one, some forms have no pages


def _path_supplies(operation: str, path: str) -> dict[str, _Supply]:
    supplies = dict(_IDS)
    for prefix, supply in _ID.items():
        if path.startswith(prefix):
            supplies["id"] = supply
    return supplies | _TAKEN.get(operation, {})


def _fill(case: Any, where: In, holder: Any, supplies: dict[str, _Supply]) -> None:
    """Put what exists in place of what was made up, where that has the right form."""
    if _is_right(case, where) and isinstance(holder, dict):
        for name in holder:
            if name in supplies and holder[name] is not None:
                holder[name] = supplies[name]()


def _is_right(case: Any, where: In) -> bool:
    part = case.meta.components.get(where)
    return part is not None and part.mode.is_positive


def _keep(case: Any) -> None:
    if case.method.upper() in ("DELETE", "PATCH") or case.operation.path.endswith("/rotate-token"):
        for name, value in (case.path_parameters or {}).items():
            if supply := _STAYS.get(_plain(unquote(str(value)))):
                case.path_parameters[name] = supply()
