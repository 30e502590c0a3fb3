"""Where PostgreSQL's programs come from: Debian's own package, or a chroot of a newer Debian.

A chroot holds programs only and is shared by all state directories. An instance's data is
mounted into a mount namespace that only its server sees.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ServicesError
from .locks import cache_dir, locked
from .packages import as_root, install, need, run, say

PACKAGE = "postgresql-17-timescaledb"
VERSION_DIR = Path("usr/lib/postgresql/17")
LIBRARY = VERSION_DIR / "lib/timescaledb.so"
# The first Debian that has the package.
FIRST_RELEASE, FIRST_CODENAME = 13, "trixie"
CLUSTER = Path("/etc/postgresql/17/main")
USER = "postgres"

# $1 is the root to run in, $2 the volume that becomes its /mnt, which every Debian has.
# The server's shared memory gets a tmpfs of its own: a kill leaves nothing behind in the machine's.
ENTER = """
root=$1; volume=$2; shift 2
mount --rbind "$volume" "$root/mnt"
if [ "$root" != / ]; then
    mount --rbind /dev "$root/dev"
    mount -t tmpfs tmpfs "$root/dev/shm"
fi
exec chroot "$root" setpriv --reuid=postgres --regid=postgres --init-groups "$@"
"""


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs below `root`, run as its own user when the caller is root."""

    root: Path

    def command(self, volume: Path, program: str, *arguments: str) -> list[str]:
        """An argv that runs `program`, keeping the pid, with `volume` where `seen` says."""
        binary = Path("/", VERSION_DIR, "bin", program)
        if os.geteuid() != 0:
            return [str(binary), *arguments]
        # As a slave the namespace lets go of what the machine unmounts later.
        enter = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", ENTER, "enter"]
        return [*enter, str(self.root), str(volume), str(binary), *arguments]

    def seen(self, volume: Path) -> Path:
        """`volume` as the server sees it, whoever may read the directories above it."""
        return Path("/mnt") if os.geteuid() == 0 else volume

    def own(self, path: Path, mode: int = 0o700) -> None:
        """Give `path` to the user that the server runs as."""
        if os.geteuid() == 0:
            os.chown(path, *self._ids())
        path.chmod(mode)

    def _ids(self) -> tuple[int, int]:
        for line in (self.root / "etc/passwd").read_text().splitlines():
            fields = line.split(":")
            if fields[0] == USER:
                return int(fields[2]), int(fields[3])
        raise ServicesError(f"no user {USER} in {self.root / 'etc/passwd'}: reinstall {PACKAGE}")


def installation() -> Installation:
    """What is installed already, else this system's package, else a chroot."""
    if Path("/", LIBRARY).exists():
        return Installation(Path("/"))
    if _debian_release() >= FIRST_RELEASE:
        _install()
        return Installation(Path("/"))
    if os.geteuid() != 0:
        raise ServicesError(f"timescaledb runs in a chroot on systems before Debian {FIRST_RELEASE}: run as root")
    return Installation(_chroot())


def _install() -> None:
    had_cluster = CLUSTER.exists()
    install([PACKAGE])
    if CLUSTER.exists() and not had_cluster:
        # The package has just made and started an empty server of its own.
        run([*as_root(), "pg_dropcluster", "--stop", CLUSTER.parent.name, CLUSTER.name])


def _debian_release() -> int:
    """0 for anything but Debian."""
    release = dict(_os_release())
    version = release.get("VERSION_ID", "")
    return int(version) if release.get("ID") == "debian" and version.isdigit() else 0


def _os_release() -> Iterator[tuple[str, str]]:
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        yield key, value.strip('"')


def _chroot() -> Path:
    root = cache_dir() / f"timescaledb-{FIRST_CODENAME}"
    if root.exists():
        return root
    with locked(cache_dir() / "timescaledb.lock"):
        if not root.exists():
            _build_chroot(root)
    return root


def _build_chroot(root: Path) -> None:
    debootstrap = need("debootstrap", ["debootstrap", "debian-archive-keyring"])
    say(f"installing {PACKAGE} into a chroot of Debian {FIRST_CODENAME}, about half a minute")
    # Renamed when complete, so that an interrupted build is never taken for a cache.
    unfinished = cache_dir() / "timescaledb-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--variant=minbase", f"--include={PACKAGE}"]
    # In a namespace of its own, what it mounts cannot outlive it.
    run(["unshare", "--mount", debootstrap, *options, FIRST_CODENAME, str(unfinished)])
    shutil.rmtree(unfinished / "var/cache/apt/archives")
    shutil.rmtree(unfinished / "var/lib/apt/lists")
    unfinished.rename(root)
