"""TLS on our own listeners: the certificate that is shown, who may connect, and a renewed one taken up while running.

Also what we show and ask for where a URL wants TLS (Kafka, a broker). Left out: connections, and PostgreSQL's TLS.
"""

import asyncio
import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from runtime.errors import ConfigurationError
from runtime.settings import setting

_log = logging.getLogger("sluice.tls")


class Variables(NamedTuple):
    """The settings that name a listener's files, for those who have to mend them."""

    certificate: str
    key: str
    client_ca: str


#: Of the listeners of ingest and API.
HTTP: Final = Variables("SLUICE_TLS_CERTIFICATE_FILE", "SLUICE_TLS_KEY_FILE", "SLUICE_TLS_CLIENT_CA_FILE")


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """What the listeners of ingest and API show and ask for; without a certificate they speak plain HTTP."""

    tls_certificate_file: str = setting(
        "", why="PEM, our own certificate first, then its chain; set: the HTTP listeners speak TLS 1.2 or later only."
    )
    tls_key_file: str = setting("", why="PEM, without a passphrase; unset: the key stands in the certificate's file.")
    tls_client_ca_file: str = setting(
        "", why="PEM; set: only clients that show a certificate of these authorities are let in."
    )
    tls_handshake_timeout_s: float = setting(
        10.0, unit="s", least=0.1, most=60, why="A handshake takes two round trips, over the slowest mobile link too."
    )
    tls_reload_s: float = setting(
        10.0, unit="s", least=0.1, most=86_400, why="How often the files are looked at: renewing needs no restart."
    )


class ServerTls:
    """What new connections of a listener are given: the certificate as it was last found good."""

    def __init__(self, settings: TlsSettings, variables: Variables = HTTP) -> None:
        """Raises `ConfigurationError` that names the setting of a file that is missing or does not fit."""
        self._settings = settings
        self._variables = variables
        self._stamp = _stamp(settings)
        self.context = load_server_context(settings, variables)

    @property
    def handshake_timeout_s(self) -> float:
        return self._settings.tls_handshake_timeout_s

    def renew(self) -> None:
        """Read the files again if they have changed; the old certificate stays while the new one is no good."""
        stamp = _stamp(self._settings)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.context = load_server_context(self._settings, self._variables)
        except ConfigurationError as error:
            _log.error("the old certificate stays: the new one is no good", extra={"reason": str(error)})
        else:
            _log.info("a renewed certificate is shown", extra={"file": self._settings.tls_certificate_file})

    async def watch(self) -> None:
        """Look for ever; its owner cancels it."""
        while True:
            await asyncio.sleep(self._settings.tls_reload_s)
            self.renew()


def server_tls(settings: TlsSettings, variables: Variables = HTTP) -> ServerTls | None:
    """None without a certificate. Raises as `ServerTls`, and for a key or an authority that has no certificate."""
    if settings.tls_certificate_file:
        return ServerTls(settings, variables)
    lonely = {variables.key: settings.tls_key_file, variables.client_ca: settings.tls_client_ca_file}
    for variable, file in lonely.items():
        if file:
            raise ConfigurationError(f"{variable} is set, but {variables.certificate} is not: set both or none")
    return None


def load_server_context(settings: TlsSettings, variables: Variables = HTTP) -> ssl.SSLContext:
    """Raises `ConfigurationError` that names the setting."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that renegotiates lets the server do the costly part again and again.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    _check_readable(variables.certificate, certificate)
    if key:
        _check_readable(variables.key, key)
    try:
        load_chain(context, certificate, key or None)
    except (ssl.SSLError, ValueError) as error:
        raise _misfit(variables, certificate, key, error) from error
    if settings.tls_client_ca_file:
        _require_clients(context, variables.client_ca, settings.tls_client_ca_file)
    return context


def load_chain(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    """Raises `OSError` or `ValueError`; never asks a terminal for a passphrase, as OpenSSL would."""
    context.load_cert_chain(certificate, key, password=_refuse_passphrase)


def _refuse_passphrase() -> str:
    raise ValueError("the key is encrypted: store it without a passphrase, readable by its user alone")


def _require_clients(context: ssl.SSLContext, variable: str, file: str) -> None:
    _check_readable(variable, file)
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{variable}={file} holds no certificate in PEM: {_reason(error)}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _check_readable(variable: str, file: str) -> None:
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{variable}={file} cannot be read: {error.strerror or error}") from error


def _misfit(variables: Variables, certificate: str, key: str, error: Exception) -> ConfigurationError:
    if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError):
        variable = variables.key if key else variables.certificate
        return ConfigurationError(f"{variable}={key or certificate}: {error}")
    reason = _reason(error)
    if "KEY_VALUES_MISMATCH" in reason or "KEY_TYPE_MISMATCH" in reason:
        return ConfigurationError(f"{variables.key}={key or certificate} is not the key of {certificate}")
    if not key:
        return ConfigurationError(
            f"{variables.certificate}={certificate} holds no certificate and key in PEM ({reason}): "
            f"{variables.key} names a key in a file of its own"
        )
    return ConfigurationError(
        f"{variables.certificate}={certificate} or {variables.key}={key} is no certificate or key in PEM ({reason})"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


def _stamp(settings: TlsSettings) -> tuple[object, ...]:
    """Differs when one of the files was written or replaced."""
    files = (settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
    return tuple(_stamp_of(Path(file)) for file in files if file)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def client_context(variable: str, options: Mapping[str, str]) -> ssl.SSLContext:
    """For connections of ours: `cafile`, `certfile` and `keyfile` are options of the URL in the setting `variable`.

    Raises `ConfigurationError`.
    """
    try:
        _check_files(variable, options)
        context = ssl.create_default_context(cafile=options.get("cafile"))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if "certfile" in options:
            load_chain(context, options["certfile"], options.get("keyfile"))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        names = " or ".join(name for name in ("cafile", "certfile", "keyfile") if name in options)
        raise ConfigurationError(f"{variable}: {names} is not what it should be, in PEM: {error}") from error
    return context


def _check_files(variable: str, options: Mapping[str, str]) -> None:
    """OpenSSL does not say which of the files it misses."""
    for name in ("cafile", "certfile", "keyfile"):
        if name in options:
            try:
                Path(options[name]).read_bytes()
            except OSError as error:
                said = error.strerror or error
                raise ConfigurationError(f"{variable}: {name}={options[name]} cannot be read: {said}") from error
