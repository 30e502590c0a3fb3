"""Settings of `sluice verify`. Left out: which records it is asked about, which are options of the command alone."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """How fast the books are checked, and in how much room."""

    verify_rate: int = setting(
        100_000,
        unit="readings/s",
        least=0,
        why="Read from the log, and then compared with the store, beside a live system: about a third of one core. "
        "0: as fast as it goes.",
    )
    verify_sort_readings_max: int = setting(
        200_000,
        unit="readings",
        least=1_000,
        why="Sorted in memory at once, about 130 bytes each; what is beyond goes through files.",
    )
    verify_findings_max: int = setting(
        50, unit="findings", least=0, why="Printed for people, the others are counted; --json prints all of them."
    )
    verify_dir: str = setting(
        "", why="Where what is sorted lies meanwhile, 40 bytes a reading; unset: the system's directory for such."
    )
