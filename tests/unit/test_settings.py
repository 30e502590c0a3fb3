"""Settings: where they come from, and that nothing wrong or unknown passes in silence."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.settings import GROUPS
from runtime.errors import ConfigurationError
from runtime.settings import MASK, Settings, setting
from workers.rollups.settings import RollupsSettings


@dataclass(frozen=True, kw_only=True)
class Group:
    wait_ms: int = setting(100, unit="ms", least=1, most=1000, why="Long enough.")
    ratio: float = setting(0.5, why="Half.")
    verbose: bool = setting(False, why="Quiet.")
    password: str = setting("", secret=True, why="Nobody else's business.")
    names: tuple[str, ...] = setting((), why="None.")
    limit: int | None = setting(None, why="None stands for no limit.")


def load(environ: dict[str, str], **overrides: object) -> Settings:
    return Settings.load([Group], environ, overrides)


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "sluice.toml"
    file.write_text("wait_ms = 1\nratio = 0.25\nverbose = true\n")
    environ = {"SLUICE_CONFIG": str(file), "SLUICE_WAIT_MS": "2", "SLUICE_RATIO": "0.75", "OTHER": "x"}
    loaded = load(environ, wait_ms=3, ratio=None)
    assert loaded.get(Group) == Group(wait_ms=3, ratio=0.75, verbose=True)
    origins = {one.variable: one.origin for one in loaded.listing}
    assert origins["SLUICE_WAIT_MS"] == "command line"
    assert origins["SLUICE_RATIO"] == "environment"
    assert origins["SLUICE_VERBOSE"] == "file"
    assert origins["SLUICE_NAMES"] == "default"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SLUICE_WAIT", "1", "SLUICE_WAIT is no setting"),
        ("SLUICE_WAIT_MS", "soon", "SLUICE_WAIT_MS='soon' is not a valid int"),
        ("SLUICE_WAIT_MS", "0", "SLUICE_WAIT_MS=0 is out of bounds: 1 to 1000 ms"),
        ("SLUICE_VERBOSE", "perhaps", "SLUICE_VERBOSE='perhaps' is not a valid bool"),
        ("SLUICE_CONFIG", "/does/not/exist", "SLUICE_CONFIG: /does/not/exist cannot be read"),
    ],
)
def test_what_is_wrong_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load({variable: value})


def test_an_unknown_name_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sluice.toml"
    file.write_text("wait = 1\n")
    with pytest.raises(ConfigurationError, match=r"wait in .* is no setting"):
        load({"SLUICE_CONFIG": str(file)})


def test_lists_and_absent_values() -> None:
    loaded = load({"SLUICE_NAMES": "a, b ,", "SLUICE_LIMIT": ""}).get(Group)
    assert loaded.names == ("a", "b")
    assert loaded.limit is None
    assert load({"SLUICE_LIMIT": "5"}).get(Group).limit == 5


def test_secrets_are_masked_where_settings_are_shown() -> None:
    loaded = load({"SLUICE_PASSWORD": "hunter2"})
    assert {one.variable: one.value for one in loaded.listing}["SLUICE_PASSWORD"] == MASK
    assert loaded.get(Group).password == "hunter2"


def test_every_setting_of_sluice_says_why_and_has_a_default_that_is_allowed() -> None:
    loaded = Settings.load(GROUPS, {})
    names = [one.variable for one in loaded.listing]
    assert len(names) == len(set(names)), "two groups declare the same setting"
    assert all(one.why for one in loaded.listing)
    defaults = {one.variable.removeprefix("SLUICE_").lower(): one.value for one in loaded.listing}
    Settings.load(GROUPS, {}, {name: value for name, value in defaults.items() if value})


@pytest.mark.parametrize(("share", "rest_s"), [(1.0, 0.0), (0.5, 2.0), (0.25, 6.0)])
def test_roll_ups_rest_for_the_part_of_the_time_that_is_not_theirs(share: float, rest_s: float) -> None:
    assert RollupsSettings(rollups_share=share).rest_s(2.0) == rest_s
