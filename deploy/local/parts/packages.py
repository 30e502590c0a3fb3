"""Installs what a part needs from the distribution's packages, and leaves no service behind.

Knows only apt; on another distribution the error names what has to be installed by hand.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ServicesError
from .locks import cache_dir, locked

# Someone else's apt-get may hold the package database for a while.
APT_LOCK_SECONDS = 300
SYSTEM_DIRS = "/usr/local/sbin:/usr/sbin:/sbin"


def say(message: str) -> None:
    """Progress goes to standard error: standard output is for `eval`."""
    print(f"services: {message}", file=sys.stderr, flush=True)


def find(program: str) -> str | None:
    """`program`'s path; daemons often live where an ordinary user's PATH does not reach."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_DIRS}")


def need(program: str, packages: Sequence[str], service: str | None = None) -> str:
    """The path of `program`, installing `packages` when it is missing, but not their `service`."""
    if (path := find(program)) is None:
        install(packages)
        if service is not None:
            _stop_service(service)
        path = find(program)
    if path is None:
        raise ServicesError(f"{program} is not on PATH although {' '.join(packages)} is installed")
    return path


def install(packages: Sequence[str]) -> None:
    """Install `packages` with apt."""
    if find("apt-get") is None:
        raise ServicesError(f"no apt-get here: install {' '.join(packages)} by hand, then retry")
    say(f"installing {' '.join(packages)}")
    lock = f"DPkg::Lock::Timeout={APT_LOCK_SECONDS}"
    with locked(cache_dir() / "apt.lock"):
        apt = [*as_root(), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y", "-o", lock]
        run([*apt, "update"])
        run([*apt, "install", "--no-install-recommends", *packages])


def as_root() -> list[str]:
    """What to put before a command that only root may run."""
    if os.geteuid() == 0:
        return []
    if (sudo := find("sudo")) is None:
        raise ServicesError("this step needs root: run it as root, or install sudo")
    return [sudo]


def run(argv: Sequence[str], *, stdin: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; what it said becomes the error."""
    done = subprocess.run(
        argv,
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise ServicesError(f"`{' '.join(argv[:6])} …` failed ({done.returncode}):\n{said}")
    return done.stdout


def _stop_service(service: str) -> None:
    """A package just installed may have started its own server on the well-known port."""
    if Path("/run/systemd/system").exists():
        stop = ["systemctl", "disable", "--now", service]
    else:
        stop = ["service", service, "stop"]
    subprocess.run([*as_root(), *stop], capture_output=True, check=False)
