"""Settings of logins, access tokens and mail. Left out: the API's own (`api.settings`)."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """How people and keys get in, and how fast a stranger may try."""

    auth_access_token_s: int = setting(
        900, unit="s", least=60, most=86_400, why="Clients renew it meanwhile; ended sessions are refused at once."
    )
    auth_session_idle_days: int = setting(
        30, unit="days", least=1, most=3_650, why="A login that is not used for that long has ended."
    )
    auth_hashes_at_once: int = setting(
        2, unit="hashes", least=1, most=64, why="Passwords being hashed, per process: each takes 64 MiB and a core."
    )
    auth_hashes_waiting_max: int = setting(
        32, unit="hashes", least=1, most=10_000, why="Beyond it a login is told to come back."
    )
    auth_login_failures_max: int = setting(
        5, unit="failures", least=1, most=1_000,
        why="Of one account from one address (IPv6: a /64); then it waits, from there.",
    )  # fmt: skip
    auth_lockout_s: int = setting(900, unit="s", least=1, most=86_400, why="How long it waits.")
    auth_login_pressure_addresses: int = setting(
        20, unit="addresses", least=1, most=10_000,
        why="Where an account's logins fail from that many within an hour, each may fail but once.",
    )  # fmt: skip
    auth_logins_per_minute: int = setting(
        30, unit="attempts/min", least=1, why="Of one address, whatever the account; per process."
    )
    auth_guesses_per_minute: int = setting(
        60, unit="tokens/min", least=1, why="Unknown tokens of one address, per process; what is known goes on."
    )
    auth_addresses_max: int = setting(
        10_000,
        unit="addresses",
        least=16,
        most=1_000_000,
        why="Whose attempts a process counts; the oldest go first.",
    )
    auth_invitation_days: int = setting(
        7, unit="days", least=1, most=90, why="Until an invitation has to be renewed."
    )
    auth_reset_minutes: int = setting(60, unit="min", least=5, most=1_440, why="For which a link resets a password.")
    smtp_url: str = setting(
        "",
        secret=True,
        why="smtp://user:password@host:port (STARTTLS where it is offered) or smtps://…; unset: no mail is sent, "
        "invitations are links in the answer, and `sluice admin reset-link` makes those for passwords.",
    )
    smtp_from: str = setting("sluice@localhost", why="Whom mails come from.")
