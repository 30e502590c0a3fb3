"""Mail by SMTP, beside requests. Left out: what is written, and who is told when there is no mail."""

import asyncio
import logging
from email.message import EmailMessage
from typing import Final
from urllib.parse import unquote, urlsplit

import aiosmtplib

from api.access.background import Background
from runtime.errors import ConfigurationError

_log = logging.getLogger("sluice.api")

VARIABLE: Final = "SLUICE_SMTP_URL"
TIMEOUT_S: Final = 20.0
AT_ONCE: Final = 2
PAUSES_S: Final = (5.0, 60.0)
_PORTS: Final = {"smtp": 587, "smtps": 465}


class Mailer:
    """Sends mails through one server; without a URL, none."""

    def __init__(self, url: str, sender: str, background: Background) -> None:
        """Raises `ConfigurationError` for a URL that is none, without showing it: it may hold a password."""
        self._sender = sender
        self._background = background
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.sends = bool(url)
        try:
            parts = urlsplit(url)
            self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port
        except ValueError:
            raise ConfigurationError(f"{VARIABLE} is no URL: smtp://user:password@host:port") from None
        if self.sends and (self._scheme not in _PORTS or not self._host):
            raise ConfigurationError(f"{VARIABLE} is smtp://user:password@host:port or smtps://…")
        self._user = None if parts.username is None else unquote(parts.username)
        self._password = None if parts.password is None else unquote(parts.password)

    def send(self, to: str, subject: str, text: str) -> None:
        """Try to, beside whoever asks; nothing without a server."""
        if not self.sends:
            return
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = self._sender, to, subject
        message.set_content(text)
        if not self._background.start(self._deliver(message)):
            _log.warning("a mail was not sent: too many are under way")

    async def _deliver(self, message: EmailMessage) -> None:
        for pause_s in (*PAUSES_S, None):
            try:
                async with self._gate:
                    await self._hand_over(message)
            except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
                # What a server answers may repeat what was sent to it.
                _log.warning("a mail was not taken", extra={"reason": type(error).__name__, "again": pause_s})
                if pause_s is None:
                    return
                await asyncio.sleep(pause_s)
            else:
                return

    async def _hand_over(self, message: EmailMessage) -> None:
        await aiosmtplib.send(
            message,
            hostname=self._host,
            port=self._port or _PORTS[self._scheme],
            username=self._user,
            password=self._password,
            use_tls=self._scheme == "smtps",
            timeout=TIMEOUT_S,
        )
