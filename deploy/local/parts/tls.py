"""An authority of the state directory's own, and the one certificate that its parts show.

It is for 127.0.0.1 by number alone, so that whoever checks names can be seen to check them.
"""

from dataclasses import dataclass
from pathlib import Path

from .errors import ServicesError
from .packages import need, run
from .state import State

DAYS = "3650"
KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Certificate:
    """Files in PEM."""

    authority: Path
    certificate: Path
    key: Path


def choose_tls(state: State) -> None:
    """From now on Kafka has a listener with TLS and logins beside its plain one, and the database takes TLS."""
    if state.tls:
        return
    if (state.directory / "kafka" / "data").exists() or (state.directory / "timescaledb" / "volume").exists():
        raise ServicesError("--tls is for new parts: `services wipe` first")
    state.tls = True


def certificate(state: State) -> Certificate:
    """Made at the first call."""
    home = state.home("tls")
    made = Certificate(home / "ca.pem", home / "server.pem", home / "server.key")
    if not made.certificate.exists():
        _make(home, made)
    return made


def _make(home: Path, made: Certificate) -> None:
    home.chmod(0o700)
    openssl = need("openssl", ["openssl"])
    request = [openssl, "req", "-x509", *KEY, "-days", DAYS]
    authority_key = home / "ca.key"
    subject = ["-subj", "/CN=Sluice local services"]
    run([*request, *subject, "-keyout", str(authority_key), "-out", str(made.authority)])
    unfinished = made.certificate.with_suffix(".new")
    signer = ["-CA", str(made.authority), "-CAkey", str(authority_key)]
    extensions = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(made.key), "-out", str(unfinished)]
    run([*request, "-subj", "/CN=sluice", *signer, *extensions, *files])
    unfinished.rename(made.certificate)
