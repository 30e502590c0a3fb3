"""Settings of erasing sites."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class ErasureSettings:
    """How fast sites are erased, beside everything else."""

    erasure_check_s: float = setting(
        2.0, unit="s", least=0.05, why="How soon a deleted site is noticed; one small query of each worker."
    )
    erasure_tokens_s: float = setting(
        2.0,
        unit="s",
        least=0,
        why="After which no ingest process takes the site's tokens any more: they follow changes within a second.",
    )
    erasure_step_rows: int = setting(
        5_000, unit="rows", least=1, most=100_000, why="Of one transaction: tens of milliseconds, so that none waits."
    )
    erasure_step_devices: int = setting(
        50, unit="devices", least=1, most=10_000, why="Of one transaction, each with up to a thousand series."
    )
    erasure_pause_ms: float = setting(
        50.0,
        unit="ms",
        least=0,
        most=60_000,
        why="After a step in whole, less after a smaller one: the database has others to serve.",
    )
