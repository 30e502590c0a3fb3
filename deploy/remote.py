"""The API as the command line sees it: where it is, who we are there, requests and what goes wrong with them.

What `sluice login` learned stands in one file of the user's own. Left out: the commands (`deploy.commands.registry`).
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen

from runtime.errors import ConfigurationError, SluiceError, UnavailableError

TIMEOUT_S: Final = 30.0
ANSWER_BYTES_MAX: Final = 50_000_000
#: Renewed that long before it ends, so that it does not end on its way.
_EARLY_S: Final = 30.0
_FILE: Final = "sluice/login.json"


class RefusedError(SluiceError):
    """The API said no: its code and its words."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})" if code else f"the API answers {status}")
        self.status = status


@dataclass(frozen=True)
class Login:
    """Where and who: an API key, or the tokens of a person's session."""

    url: str
    organisation: str | None = None
    api_key: str | None = None
    refresh_token: str | None = None
    access_token: str | None = None
    ends_s: float = 0.0
    """Unix seconds at which the access token ends."""


def login_file() -> Path:
    """`login.json` in the user's configuration (XDG Base Directory)."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / _FILE


def keep(login: Login | None) -> None:
    """For the commands to come; None forgets it. Readable by its owner only."""
    path = login_file()
    if login is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(login), file)
    temporary.replace(path)


def kept() -> Login:
    """Raises `ConfigurationError` where nobody has logged in."""
    try:
        return Login(**json.loads(login_file().read_text()))
    except FileNotFoundError:
        raise ConfigurationError("nobody has logged in: `sluice login URL`") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{login_file()} cannot be read: `sluice login URL` writes it anew") from error


def address(url: str) -> str:
    """A base URL as it is kept. Raises `ConfigurationError`."""
    parts = urlsplit(url if "//" in url else f"https://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigurationError("the URL of an API is http(s)://host[:port]")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


class Remote:
    """Requests on behalf of a login; a person's access token is renewed when it has to be."""

    def __init__(self, login: Login) -> None:
        self.login = login

    @property
    def organisation(self) -> str:
        """Raises `ConfigurationError` where none was chosen."""
        if self.login.organisation is None:
            raise ConfigurationError("no organisation is chosen: `sluice org list`, then `sluice org use ID`")
        return self.login.organisation

    def ask(self, method: str, *path: str, body: object = None, **query: object) -> Any:
        """The answer's JSON; parts of the path are escaped. Raises `RefusedError`, `UnavailableError`."""
        parameters = urlencode({name.rstrip("_"): value for name, value in query.items() if value is not None})
        target = "/".join(quote(part, safe="") for part in path) + (f"?{parameters}" if parameters else "")
        return _request(f"{self.login.url}/{target}", method, body, self._credential())

    def all(self, *path: str, cursor_name: str = "next_cursor", **query: object) -> list[Any]:
        """Every row of a list, page after page."""
        rows: list[Any] = []
        cursor = None
        while True:
            page = self.ask("GET", *path, cursor=cursor, **query)
            rows += page["data"]
            cursor = page.get(cursor_name)
            if cursor is None:
                return rows

    def _credential(self) -> dict[str, str]:
        login = self.login
        if login.api_key is not None:
            return {"Authorization": f"Bearer {login.api_key}"}
        if login.refresh_token is not None and time.time() > login.ends_s - _EARLY_S:
            tokens = _request(f"{login.url}/api/v1/auth/refresh", "POST", {"refresh_token": login.refresh_token}, {})
            self.login = with_tokens(login, tokens)
            keep(self.login)
        return {"Authorization": f"Bearer {self.login.access_token}"}


def with_tokens(login: Login, tokens: Mapping[str, Any]) -> Login:
    """The login with what logging in, renewing or switching answered."""
    return replace(
        login,
        organisation=tokens["organisation_id"],
        refresh_token=tokens.get("refresh_token", login.refresh_token),
        access_token=tokens["access_token"],
        ends_s=time.time() + tokens["expires_in"],
    )


def _request(url: str, method: str, body: object, headers: Mapping[str, str]) -> Any:
    data = None if body is None else json.dumps(body).encode()
    sent = {"Accept": "application/json", **({"Content-Type": "application/json"} if data else {}), **headers}
    try:
        with urlopen(Request(url, data, sent, method=method), timeout=TIMEOUT_S) as answer:  # noqa: S310 - checked
            raw = answer.read(ANSWER_BYTES_MAX)
    except HTTPError as error:
        raise _refused(error) from None
    except (OSError, HTTPException) as error:
        raise UnavailableError(f"{urlsplit(url).netloc} cannot be reached: {error}") from error
    try:
        return json.loads(raw) if raw else None
    except ValueError as error:
        raise UnavailableError(f"{urlsplit(url).netloc} does not answer as an API of Sluice does") from error


def _refused(error: HTTPError) -> RefusedError:
    """In whichever shape the face words it."""
    try:
        content = json.loads(error.read(ANSWER_BYTES_MAX))
        said = content["error"] if isinstance(content.get("error"), dict) else content
        return RefusedError(error.code, said["code"], said.get("message") or said.get("detail"))
    except (ValueError, TypeError, KeyError, AttributeError):
        return RefusedError(error.code, "", "")
