"""Who sends: from a request's token and the names in it to the devices that its readings belong to.

Left out: how credentials are looked up and kept (`ingest.credentials`).
"""

import asyncio
from hashlib import blake2b
from typing import Final

import msgspec
from aiohttp import hdrs, web

from ingest.admit import Rejection
from ingest.credentials import KNOWN, Credentials, Grant, UnknownTokenError, names_device
from ingest.formats.shape import Submission, storable
from ingest.http.answers import Refusal
from ingest.limits import Limits
from ingest.metrics import IngestMetrics
from runtime.addresses import Proxies
from runtime.errors import UnavailableError
from runtime.secrets import (
    API_KEY_PREFIX,
    DEVICE_PREFIX,
    GATEWAY_PREFIX,
    TokenHasher,
    plausible_jwt,
    plausible_token,
)
from schemas.errors import ReadingCode, RequestCode

SENDERS: Final = ("device", "gateway")
SUSPENDED: Final = "the device is suspended"

#: A receipt names each one's record, and has to fit into the URL that asks for it.
_DEVICES_MAX: Final = 400
_DEVICE_NAME_MAX: Final = 64
_PREFIXES: Final = (DEVICE_PREFIX, GATEWAY_PREFIX, API_KEY_PREFIX)

Submissions = dict[bytes, list[tuple[int, Submission]]]


class ByDevice(msgspec.Struct):
    """Each device's submissions with the index of their first measurement, and what belongs to no device."""

    devices: Submissions
    suspended: Submissions
    """Of devices that may not send: refused, but kept."""
    strays: list[Rejection]


class Callers:
    """Whom the tokens of one process's requests stand for; `start` begins, `stop` ends its own tasks."""

    def __init__(
        self,
        credentials: Credentials,
        hasher: TokenHasher,
        limits: Limits,
        trusted_proxies: tuple[str, ...],
        metrics: IngestMetrics,
    ) -> None:
        self._credentials = credentials
        self._hasher = hasher
        self._limits = limits
        self._proxies = Proxies(trusted_proxies)
        self._metrics = metrics

    @property
    def tasks(self) -> "list[asyncio.Task[None]]":
        return self._credentials.tasks

    @property
    def trouble(self) -> str | None:
        """Why unknown tokens cannot be looked up right now; None when they can."""
        return self._credentials.trouble

    @property
    def registry_age_s(self) -> float:
        """Since changes of credentials were last read."""
        return self._credentials.age_s

    async def start(self) -> None:
        await self._credentials.start()

    async def stop(self) -> None:
        await self._credentials.stop()

    def known(self, token: str | None, kinds: tuple[str, ...]) -> Grant | None:
        """The grant of a token that can be believed without asking; None for one that has to be asked about."""
        if not token:
            return None
        grant = self._credentials.cached(self._hasher.digest(token))
        if grant is None:
            return None
        self._metrics.credential_lookups.add(KNOWN)
        return _fitting(grant, kinds)

    async def look_up(self, request: web.BaseRequest, token: str | None, kinds: tuple[str, ...]) -> Grant:
        headers = request.headers
        address = self._proxies.client(
            request.remote, headers.getall(hdrs.X_FORWARDED_FOR, ()), headers.getall(hdrs.FORWARDED, ())
        )
        # The checksum turns away what was never a token of ours before anybody is asked. A site's server or edge box
        # has a JWT, which is known by its hash like every token: its signature is for others to check.
        is_plausible = token is not None and (
            any(plausible_token(token, prefix) for prefix in _PREFIXES) or plausible_jwt(token)
        )
        if token and is_plausible:
            return _fitting(await self._find(token, address), kinds)
        self._limits.check_stranger(address)
        self._limits.count_stranger(address)
        if not token:
            raise Refusal(RequestCode.AUTH_REQUIRED, "send `Authorization: Bearer <token>`, or `token=` in the query")
        raise _invalid()

    async def _find(self, token: str, address: bytes) -> Grant:
        """The grant of what may be a token. Whoever sends one again and again that is not good is alone with it."""
        digests = self._hasher.digests(token)
        theirs, own = _apart(address, b""), _apart(address, digests[0])
        self._limits.check_stranger(own)
        self._limits.check_stranger(theirs)
        try:
            return await self._credentials.find(digests)
        except UnknownTokenError as error:
            self._limits.count_stranger(theirs if error.asked else own)
        except UnavailableError as error:
            raise Refusal(RequestCode.REGISTRY_UNAVAILABLE, str(error)) from error
        raise _invalid()

    async def devices(self, grant: Grant, header: str | None, submissions: list[Submission]) -> ByDevice:
        if header is None:
            _check_names(submissions)
        devices: Submissions = {}
        suspended: Submissions = {}
        strays: list[Rejection] = []
        first = 0
        for submission in submissions:
            name = header if header is not None else submission.device
            device, code, message = await self._device(grant, name)
            if device is None:
                strays += [
                    Rejection(index, str(code), message)
                    for index in range(first, first + len(submission.measurements))
                ]
            else:
                group = devices if code is None else suspended
                group.setdefault(device, []).append((first, submission))
            first += len(submission.measurements)
        if not devices and not suspended and strays:
            raise Refusal(RequestCode.DEVICE_MISMATCH, strays[0].message)
        return ByDevice(devices, suspended, strays)

    async def _device(self, grant: Grant, name: object) -> tuple[bytes | None, ReadingCode | None, str]:
        """The device of this name, and why its readings are refused, if they are."""
        mismatch = ReadingCode.DEVICE_MISMATCH
        if grant.device is not None:
            if names_device(grant, name):
                if grant.suspended:
                    return grant.device, ReadingCode.DEVICE_SUSPENDED, SUSPENDED
                return grant.device, None, ""
            return None, mismatch, "`device` is not the device of this token"
        if type(name) is not str or not 0 < len(name) <= _DEVICE_NAME_MAX or not storable(name):
            return None, mismatch, "a gateway names the `device` that each reading belongs to"
        try:
            found = await self._credentials.site_device(grant, name)
        except UnavailableError as error:
            raise Refusal(RequestCode.REGISTRY_UNAVAILABLE, str(error)) from error
        if found.suspended:
            return found.device, ReadingCode.DEVICE_SUSPENDED, SUSPENDED
        if found.device is None:
            return None, mismatch, "no device of this name at the gateway's site"
        return found.device, None, ""


def _apart(address: bytes, digest: bytes) -> bytes:
    """A count of its own for one token from an address, or for all that may be tokens.

    Somebody's junk, or one token that was revoked, must not lock out the devices beside him.
    """
    return blake2b(address + digest, digest_size=len(address), person=b"plausible token").digest()


def _invalid() -> Refusal:
    return Refusal(RequestCode.TOKEN_INVALID, "the token is unknown, revoked or expired")


def _fitting(grant: Grant, kinds: tuple[str, ...]) -> Grant:
    if grant.kind not in kinds:
        message = "an API key reads; readings are sent with a device's or gateway's token"
        raise Refusal(RequestCode.FORBIDDEN, message)
    return grant


def check_active(grant: Grant) -> None:
    """Raises a refusal for a suspended device, of which readings are taken, for the quarantine, and nothing else."""
    if grant.suspended:
        raise Refusal(RequestCode.DEVICE_SUSPENDED, SUSPENDED)


def bearer(request: web.BaseRequest) -> str | None:
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _check_names(submissions: list[Submission]) -> None:
    """Raises a refusal for more devices than a request may have, before any of them is looked up."""
    if len(submissions) > _DEVICES_MAX:
        names = {submission.device for submission in submissions if type(submission.device) is str}
        if len(names) > _DEVICES_MAX:
            message = f"a request has readings of up to {_DEVICES_MAX} devices, not {len(names)}: split it"
            raise Refusal(RequestCode.TOO_MANY_READINGS, message)
