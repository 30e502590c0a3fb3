"""Settings of the way out. Left out: the database's own (`runtime.postgres`)."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from runtime.mqtt import PORTS
from runtime.settings import setting
from runtime.sockets import Address
from runtime.urls import check_query, check_server, split_url


def _check_mqtt_url(url: str) -> None:
    parts = split_url(url, tuple(PORTS))
    check_server(parts)
    check_query(parts, ())
    if "@" in parts.netloc:
        raise ValueError("has a login, which every device would be told")


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Where the API listens, what one request may cost, and what sites are told."""

    api_listen: str = setting(
        "127.0.0.1:8081", why="host:port of the API; `sluice up` serves it on the ingest face's."
    )
    api_url: str = setting(
        "",
        why="How people reach the API, for links in invitations and to new passwords, and devices for their first "
        "certificate; unset: its address, and with `sluice up` SLUICE_PUBLIC_URL.",
    )
    public_url: str = setting(
        "", why="How devices reach the ingest face, for what they are told; unset: its address."
    )
    mqtt_public_url: str = setting(
        "",
        check=_check_mqtt_url,
        why="mqtts://host:port at which devices reach the broker, for what they are told; unset: port 8883 of the "
        "host of SLUICE_PUBLIC_URL.",
    )
    api_processes: int = setting(1, unit="processes", least=1, most=256, why="One event loop uses one core.")
    api_page_readings_max: int = setting(
        10_000, unit="readings", least=1, most=100_000, why="Of one answer; bounds its memory and time."
    )
    api_page_readings_default: int = setting(
        1_000, unit="readings", least=1, most=100_000, why="Of an answer whose request names no limit."
    )
    api_stream_readings_max: int = setting(
        10_000_000,
        unit="readings",
        least=1,
        why="Of an answer without a limit, in another form than JSON by rows: a year of 19 series at one a minute.",
    )
    api_stream_block_readings: int = setting(
        10_000, unit="readings", least=1, most=1_000_000, why="Read at once for a stream: bounds its memory."
    )
    api_streams_per_organisation_max: int = setting(
        4, unit="streams", least=1, why="Per process: one that is read slowly stays for long."
    )
    api_page_series_max: int = setting(
        5_000, unit="series", least=1, most=100_000, why="That one answer is put together from: a site may have many."
    )
    api_aggregate_cells_max: int = setting(
        200_000,
        unit="buckets",
        least=1,
        most=10_000_000,
        why="Of one answer, over all its series: bounds its memory.",
    )
    api_aggregate_readings_max: int = setting(
        5_000_000,
        unit="readings",
        least=1,
        why="That one question goes through where no roll-up will do: percentiles, buckets below 5 minutes.",
    )
    api_batch_questions_max: int = setting(
        200, unit="questions", least=1, most=10_000, why="Of one batch: a dashboard has some dozens of panels."
    )
    api_statement_timeout_ms: int = setting(
        10_000,
        unit="ms",
        least=100,
        why="A page takes milliseconds; whatever takes longer is given up. So is a database that says nothing, after "
        "5 times as long.",
    )
    api_connection_wait_ms: int = setting(
        2_000, unit="ms", least=1, why="For a session of the pool; beyond it the request is told to come back."
    )
    api_quarantine_rows_max: int = setting(
        500, unit="rows", least=1, most=10_000, why="Of one answer about the quarantine, about 8 kB each at most."
    )
    api_quarantine_rows_default: int = setting(
        100, unit="rows", least=1, most=10_000, why="Of an answer whose request names no limit."
    )
    api_quarantine_changes_max: int = setting(
        1_000,
        unit="rows",
        least=1,
        most=100_000,
        why="That one request replays or discards; it is repeated for the rest.",
    )
    api_quarantine_payload_bytes_max: int = setting(
        8_000, unit="bytes", least=100, most=65_536, why="Of an edited payload: the longest text a reading may have."
    )
    mqtt_token_port: int = setting(
        0, unit="port", least=0, most=65_535, why="Of the broker's listener for tokens; 0: as SLUICE_MQTT_PUBLIC_URL."
    )
    mqtt_password_port: int = setting(
        0, unit="port", least=0, most=65_535, why="Of the one for passwords; 0: as SLUICE_MQTT_PUBLIC_URL."
    )
    plant_token_s: int = setting(
        3_600,
        unit="s",
        least=60,
        most=86_400,
        why="That a plant's token is good for the broker: whoever reads one along has an hour.",
    )
    plant_renewal_days: int = setting(
        30, unit="days", least=1, most=365, why="Before its end a plant's certificate is at risk: time for a visit."
    )
    command_timeout_s: int = setting(
        300, unit="s", least=1, most=604_800, why="After which a command that its device did not answer has failed."
    )
    commands_open_max: int = setting(
        100, unit="commands", least=1, most=10_000, why="That wait for one device: nobody sends more than it can do."
    )
    site_domain: str = setting(
        "sites.internal",
        why="A site's `url` is a name under it. `.internal` is reserved for private networks, so that no address "
        "leads to a stranger's host by default: set a domain whose `*` leads to your sites.",
    )
    site_server_port: int = setting(
        5_000, unit="port", least=1, most=65_535, why="Of `siteServerUrl`: where edge devices reach a site's server."
    )
    site_silence_s: int = setting(
        90,
        unit="s",
        least=1,
        most=86_400,
        why="Without a heartbeat for longer, a server or edge device is offline: three missed of one every 30 s.",
    )
    site_edges_max: int = setting(
        500, unit="edge devices", least=1, most=10_000, why="Of one site: they are all in the answer about it."
    )


def broker_address(settings: ApiSettings) -> Address:
    """Where devices reach the broker."""
    parts = urlsplit(settings.mqtt_public_url or settings.public_url)
    own = parts.port if settings.mqtt_public_url else None
    return Address(parts.hostname or "localhost", own or PORTS.get(parts.scheme, PORTS["mqtts"]))
