"""Invitations and links for passwords by mail: what arrives, and that nobody waits for it."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.databases import Database
from tests.people_rig import People, people
from tests.support import run


@dataclass
class Postbox:
    """A mail server: keeps what it is sent, once it is open."""

    port: int = 0
    mails: list[str] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.open.wait()
        writer.write(b"220 here\r\n")
        while line := await reader.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                writer.write(b"354 go on\r\n")
                self.mails.append((await reader.readuntil(b"\r\n.\r\n")).decode())
                self.arrived.set()
            writer.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
            if verb == b"QUIT":
                break
        writer.close()

    async def next(self) -> str:
        await self.arrived.wait()
        self.arrived.clear()
        # What is too long for a line is folded, with an equals sign at its end.
        return self.mails[-1].replace("=\r\n", "").replace("=3D", "=")


@asynccontextmanager
async def postbox() -> AsyncIterator[Postbox]:
    box = Postbox()
    server = await asyncio.start_server(box.serve, "127.0.0.1", 0)
    box.port = server.sockets[0].getsockname()[1]
    async with server:
        yield box


async def forgot(here: People, email: str) -> int:
    return (await here.ask("POST", "/api/v1/auth/password/forgot", body={"email": email})).status


def token_in(mail: str) -> str:
    match = re.search(r"#\w+=(\w+)", mail)
    assert match is not None, mail
    return match[1]


def test_an_invitation_is_mailed_and_not_told_and_nobody_waits_for_the_mail(database: Database) -> None:
    async def test() -> None:
        async with postbox() as box, people(database, smtp_url=f"smtp://127.0.0.1:{box.port}") as here:
            where = f"/api/v1/organisations/{here.organisation}/invitations"
            made = await here.ask("POST", where, here.key, {"email": "new@example.org", "role": "viewer"})
            assert (made.status, "link" in made.body) == (201, False)
            box.open.set()
            mail = await box.next()
            assert "To: new@example.org" in mail
            body = {"token": token_in(mail), "password": "correct horse battery", "name": "New"}
            assert (await here.ask("POST", "/api/v1/invitations/accept", body=body)).status == 200

    run(test())


def test_a_link_for_a_password_is_mailed_to_who_has_an_account(database: Database) -> None:
    async def test() -> None:
        async with postbox() as box, people(database, smtp_url=f"smtp://127.0.0.1:{box.port}") as here:
            box.open.set()
            person = await here.person()
            assert await forgot(here, "nobody@example.org") == 204
            assert await forgot(here, person.email.upper()) == 204
            mail = await box.next()
            assert len(box.mails) == 1
            new = "another horse battery"
            body = {"token": token_in(mail), "new_password": new}
            assert (await here.ask("POST", "/api/v1/auth/password/reset", body=body)).status == 204
            assert (await here.ask("POST", "/api/v1/auth/password/reset", body=body)).code == (422, "invalid")
            assert (await here.login(person, new)).status == 200

    run(test())


def test_a_person_is_not_flooded_with_links(database: Database) -> None:
    async def test() -> None:
        async with postbox() as box, people(database, smtp_url=f"smtp://127.0.0.1:{box.port}") as here:
            box.open.set()
            person, other = await here.person(), await here.person()
            for _ in range(6):
                assert await forgot(here, person.email) == 204
            assert await forgot(here, other.email) == 204
            while f"To: {other.email}" not in "".join(box.mails):
                await box.next()
            links = "SELECT user_id FROM password_resets WHERE user_id = $1"
            while "".join(box.mails).count(f"To: {person.email}") < 3:
                await box.next()
            assert await forgot(here, person.email) == 204
            assert await forgot(here, other.email) == 204
            while "".join(box.mails).count(f"To: {other.email}") < 2:
                await box.next()
            assert len(await here.superuser(links, person.user)) == 3

    run(test())


def test_where_no_mail_goes_out_requests_are_answered_and_the_end_waits_for_nothing(database: Database) -> None:
    async def test() -> None:
        async with people(database, smtp_url="smtp://user:geheim@127.0.0.1:1") as here:
            assert await forgot(here, (await here.person()).email) == 204

    run(test())
