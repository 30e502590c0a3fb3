"""Settings: declared as dataclass fields, read from `SLUICE_…` variables over a TOML file over defaults.

Each package declares its own group; the command line names all groups, so that a variable nobody declares stops
the start. Left out: what a setting means.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from runtime.errors import ConfigurationError

PREFIX: Final = "SLUICE_"
CONFIG_VARIABLE: Final = "SLUICE_CONFIG"
MASK: Final = "********"

T = TypeVar("T")


def setting(
    default: Any,
    *,
    why: str,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    secret: bool = False,
    check: Callable[[str], None] | None = None,
) -> Any:
    """A field of a settings group: its default, the unit of its value, and why it is what it is.

    `least` and `most` bound a number, both allowed. `secret` values are masked wherever settings are shown. `check`
    raises `ValueError` for a text that is not what it should be, without quoting what may be a secret.
    """
    metadata = {"why": why, "unit": unit, "least": least, "most": most, "secret": secret, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting as it stands: for `sluice settings`."""

    variable: str
    value: str
    origin: str
    unit: str
    why: str


class Settings:
    """All groups, resolved. `get` returns a group; `listing` tells every value and where it came from."""

    def __init__(self, groups: dict[type, Any], listing: list[Setting]) -> None:
        self._groups = groups
        self.listing = listing

    def get(self, group: type[T]) -> T:
        return typing.cast("T", self._groups[group])

    @classmethod
    def load(
        cls,
        groups: Iterable[type],
        environ: Mapping[str, str],
        overrides: Mapping[str, object] | None = None,
    ) -> "Settings":
        """Read every group. `overrides` (of the command line, by field name) win over the environment.

        Raises `ConfigurationError` that names the variable for an unknown one, a bad value, or a file that cannot
        be read.
        """
        groups = list(groups)
        known = {PREFIX + field.name.upper(): field for group in groups for field in dataclasses.fields(group)}
        _refuse_unknown(environ, known)
        sources = _Sources(environ, _read_file(environ.get(CONFIG_VARIABLE), known), overrides or {})
        listing: list[Setting] = []
        built = {group: _build(group, sources, listing) for group in groups}
        return cls(built, listing)


@dataclasses.dataclass(frozen=True)
class _Sources:
    environ: Mapping[str, str]
    file: Mapping[str, object]
    overrides: Mapping[str, object]

    def find(self, name: str) -> tuple[object, str] | None:
        variable = PREFIX + name.upper()
        if self.overrides.get(name) is not None:
            return self.overrides[name], "command line"
        if variable in self.environ:
            return self.environ[variable], "environment"
        if name in self.file:
            return self.file[name], "file"
        return None


def _refuse_unknown(environ: Mapping[str, str], known: Mapping[str, object]) -> None:
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable != CONFIG_VARIABLE and variable not in known:
            raise ConfigurationError(
                f"{variable} is no setting of Sluice: unset it, or see `sluice settings` for the names"
            )


def _read_file(path: str | None, known: Mapping[str, object]) -> Mapping[str, object]:
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{CONFIG_VARIABLE}: {path} cannot be read: {error}") from error
    for name in content:
        if PREFIX + name.upper() not in known:
            raise ConfigurationError(f"{name} in {path} is no setting of Sluice: see `sluice settings`")
    return content


def _build(group: type, sources: _Sources, listing: list[Setting]) -> Any:
    hints = typing.get_type_hints(group)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        variable = PREFIX + field.name.upper()
        found = sources.find(field.name)
        value = field.default if found is None else _parse(variable, hints[field.name], found[0])
        _check_bounds(variable, value, field.metadata)
        _check_shape(variable, value, field.metadata)
        values[field.name] = value
        # What everybody can read in the code is no secret, and tells more than its mask.
        is_secret = field.metadata.get("secret") and value and found is not None
        shown = MASK if is_secret else _show(value)
        listing.append(
            Setting(
                variable,
                shown,
                "default" if found is None else found[1],
                field.metadata.get("unit", ""),
                field.metadata.get("why", ""),
            )
        )
    return group(**values)


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _parse(variable: str, hint: Any, raw: object) -> Any:
    if isinstance(hint, types.UnionType):  # `str | None` and its like: an empty text is None
        if raw in ("", None):
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    text = str(raw).strip()
    try:
        if hint is bool:
            return _parse_bool(text)
        if typing.get_origin(hint) is tuple:
            parts = raw if isinstance(raw, list) else text.split(",")
            return tuple(str(part).strip() for part in parts if str(part).strip())
        return hint(text)
    except ValueError:
        raise ConfigurationError(f"{variable}={text!r} is not a valid {hint.__name__}") from None


def _parse_bool(text: str) -> bool:
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _check_bounds(variable: str, value: Any, metadata: Mapping[str, Any]) -> None:
    least, most = metadata.get("least"), metadata.get("most")
    if not isinstance(value, (int, float)):
        return
    # Written so that NaN, which is neither less nor more than anything, is out of bounds as well.
    if not ((least is None or value >= least) and (most is None or value <= most) and value == value):
        span = f"{least} to {most}" if most is not None else f"at least {least}"
        raise ConfigurationError(f"{variable}={value} is out of bounds: {span} {metadata['unit']}".rstrip())


def _check_shape(variable: str, value: Any, metadata: Mapping[str, Any]) -> None:
    check = metadata.get("check")
    if check is None or not value:
        return
    try:
        check(value)
    except ValueError as error:
        raise ConfigurationError(f"{variable} {error}") from None
