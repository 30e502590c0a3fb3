"""Settings of certificates and of the tokens that devices get their first one with."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class CertificateSettings:
    """How long certificates are good, and how many there may be."""

    certificate_root_days: int = setting(
        7_300, unit="days", least=1, most=36_500, why="Of a root, 20 years: devices hold it in their firmware."
    )
    certificate_issuing_days: int = setting(
        3_650,
        unit="days",
        least=1,
        most=36_500,
        why="Of an issuing authority, 10 years; `sluice ca renew` makes the next. It outlives what it signs.",
    )
    certificate_server_days: int = setting(
        397, unit="days", least=1, most=3_650, why="Of a broker: made anew each year, as public ones have to be."
    )
    certificate_device_days: int = setting(
        365, unit="days", least=1, most=3_650, why="Of a device: one that nobody renews is not trusted for ever."
    )
    certificate_renewal_days: int = setting(
        30,
        unit="days",
        least=1,
        most=365,
        why="Before its end a device's certificate is due to be renewed: time enough for a visit.",
    )
    certificate_overlap_hours: int = setting(
        168,
        unit="h",
        least=0,
        most=8_760,
        why="For which a device's old certificate stays good once it has a new one: a week to bring that there.",
    )
    certificates_per_organisation_max: int = setting(
        20_000,
        unit="certificates",
        least=1,
        why="That have not ended, revoked ones too: no organisation fills the revocation list of all.",
    )
    crl_entries_max: int = setting(
        100_000,
        unit="certificates",
        least=1,
        why="With as many revoked ones, none is issued: the list has 7 MB then, and each broker holds it in memory.",
    )
    crl_renewal_hours: int = setting(
        24, unit="h", least=1, most=720, why="How old a revocation list may be that tells of nothing new."
    )
    crl_lifetime_hours: int = setting(
        168,
        unit="h",
        least=2,
        most=8_760,
        why="A broker whose list has ended lets nobody in: a week to mend whatever brings it the next one.",
    )
    registration_token_hours: int = setting(
        24, unit="h", least=1, most=8_760, why="In which a new device is installed and asks for its certificate."
    )
    registration_tokens_max: int = setting(
        1_000, unit="tokens", least=1, most=100_000, why="That wait to be used, of one organisation."
    )
