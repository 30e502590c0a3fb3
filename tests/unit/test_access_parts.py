"""Passwords, guesses, mail's address: what bounds them, and what they refuse."""

import asyncio
import threading

import pytest

from api.access import passwords
from api.access.background import Background
from api.access.guesses import Guesses
from api.access.mail import Mailer
from api.access.passwords import Passwords, hash_password
from api.http.problems import Problem
from runtime.clock import ManualClock
from runtime.errors import ConfigurationError
from runtime.logging import redact
from runtime.secrets import INVITATION_PREFIX, REFRESH_PREFIX, RESET_PREFIX, make_token, without_secrets
from tests.support import run

HERE, THERE = bytes(15) + b"\1", bytes(15) + b"\2"


def refused(guesses: Guesses, address: bytes) -> int | None:
    """The seconds to wait; None where it may go on."""
    try:
        guesses.check(address)
    except Problem as problem:
        return int(problem.headers["Retry-After"]) if problem.kind.status == 429 else -1
    return None


def test_an_address_that_tries_too_often_waits_for_its_minute_to_end() -> None:
    clock = ManualClock()
    guesses = Guesses(clock, per_minute=3, addresses_max=16)
    for _ in range(3):
        assert refused(guesses, HERE) is None
        guesses.count(HERE)
        clock.advance(10)
    assert refused(guesses, HERE) == 30
    assert refused(guesses, THERE) is None
    clock.advance(29.5)
    assert refused(guesses, HERE) == 1
    clock.advance(0.6)
    assert refused(guesses, HERE) is None
    guesses.count(HERE)
    assert refused(guesses, HERE) is None


def test_as_many_addresses_are_counted_as_may_be_and_the_oldest_goes() -> None:
    guesses = Guesses(ManualClock(), per_minute=1, addresses_max=16)
    addresses = [bytes(15) + bytes([number]) for number in range(17)]
    for address in addresses:
        guesses.count(address)
    assert refused(guesses, addresses[0]) is None
    assert all(refused(guesses, address) for address in addresses[1:])


# ---------------------------------------------------------------- passwords


def test_a_password_is_its_own_however_it_is_typed() -> None:
    async def test() -> None:
        checker = Passwords(at_once=1, waiting_max=2)
        stored = await checker.hash("Mu\u0308hle\u00a01234")
        assert stored.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
        assert await checker.verify(stored, "M\u00fchle 1234")
        assert not await checker.verify(stored, "Muhle 1234")
        assert not await checker.verify(None, "of an account that is not there")
        assert not await checker.verify("no hash at all", "x")
        checker.close()

    run(test())


def test_the_loop_goes_on_and_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    at_work = threading.Semaphore(0)

    def slow(stored: str, password: str) -> bool:
        at_work.release()
        return held.wait(30)

    monkeypatch.setattr(passwords, "_verify", slow)

    async def test() -> None:
        checker = Passwords(at_once=2, waiting_max=3)
        waiting = [asyncio.create_task(checker.verify("x", "x")) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as raised:
            await checker.verify("x", "x")
        assert (raised.value.kind.code, "Retry-After" in raised.value.headers) == ("overloaded", True)
        held.set()
        assert await asyncio.gather(*waiting) == [True] * 5
        assert await checker.verify("x", "x")
        checker.close()

    run(test())


def test_hashes_of_one_password_differ() -> None:
    assert hash_password("correct horse") != hash_password("correct horse")


# ---------------------------------------------------------------- beside requests


def test_so_much_is_done_beside_requests_and_no_more() -> None:
    async def test() -> None:
        background = Background(most=2)
        gate = asyncio.Event()

        async def wait() -> None:
            await gate.wait()

        assert [background.start(wait()) for _ in range(3)] == [True, True, False]
        gate.set()
        await background.settle()
        assert background.start(wait())
        await background.settle()
        gate.clear()
        assert background.start(wait())
        await background.close()
        await background.settle()

    run(test())


@pytest.mark.parametrize("url", ["mail.example", "http://mail.example", "smtp://", "smtp://user:geheim@host:port"])
def test_a_mail_server_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_SMTP_URL") as raised:
        Mailer(url, "sluice@example.org", Background(most=1))
    assert "geheim" not in str(raised.value)


@pytest.mark.parametrize("prefix", [REFRESH_PREFIX, INVITATION_PREFIX, RESET_PREFIX])
def test_secrets_of_people_are_blotted_out_wherever_they_turn_up(prefix: str) -> None:
    token = make_token(prefix)
    for text in (f"x {token} y", f"https://sluice.example/account#reset={token}", f"%22{token}%22"):
        assert token not in redact(text)
        assert token not in without_secrets(text)


def test_work_that_overlooks_being_cancelled_once_ends_all_the_same() -> None:
    async def test() -> None:
        background, overlooked = Background(most=1), []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                overlooked.append(True)
            await asyncio.sleep(60)

        background.start(work())
        await asyncio.sleep(0)
        await background.close()
        assert overlooked == [True]

    run(test(), 10.0)
