"""How far deleted sites are erased, over HTTP: the list, one of them, and who may ask."""

from typing import Any
from uuid import UUID, uuid4

from tests.databases import Database
from tests.services.test_sites_face import Sites, another, face
from tests.support import run

PATH = "/api/v1/erasures"


async def ask(here: Sites, path: str = "", *, key: str = "", **query: Any) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key or here.key}"}
    url = f"{here.here.url}{PATH}{path}"
    async with here.here.session.get(url, headers=headers, params=query) as answer:
        return answer.status, await answer.json()


async def deleted(here: Sites, count: int) -> list[str]:
    found = []
    for _ in range(count):
        site = (await here.create())["id"]
        assert (await here.ask("DELETE", f"/{site}")).status == 202
        found.append(site)
    return found


def test_deleted_sites_are_listed_the_last_one_first(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            await here.create()
            assert await ask(here) == (200, {"data": [], "next_cursor": None})
            sites = await deleted(here, 5)
            await here.superuser(
                "UPDATE erasures SET state = 'done', finished_at = now(), readings = 7, devices = 2"
                " WHERE site_id = $1",
                UUID(sites[0]),
            )
            found: list[Any] = []
            query: dict[str, Any] = {"limit": 2}
            while True:
                status, page = await ask(here, **query)
                assert status == 200, page
                found += page["data"]
                if page["next_cursor"] is None:
                    break
                query["cursor"] = page["next_cursor"]
            assert [one["site_id"] for one in found] == sites[::-1]
            assert {one["state"] for one in found[:-1]} == {"waiting"}
            status, one = await ask(here, f"/{sites[0]}")
            assert (status, one) == (200, found[-1])
            assert (one["state"], one["readings"], one["devices_removed"]) == ("done", 7, 2)
            assert one["finished_at"] >= one["requested_at"]

    run(test())


def test_another_s_erasure_is_one_that_is_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            other = await another(here)
            (site,) = await deleted(other, 1)
            standing = (await here.create())["id"]
            answers = [await ask(here, f"/{one}") for one in (site, standing, uuid4(), "not-a-uuid")]
            assert {(status, body["code"]) for status, body in answers} == {(404, "erasure_not_found")}
            assert (await ask(here))[1]["data"] == []
            (own,) = await deleted(here, 1)
            _, page = await ask(other, limit=1)
            assert [one["site_id"] for one in page["data"]] == [site]
            assert (await ask(here, f"/{own}"))[0] == 200

    run(test())


def test_who_reads_sites_may_ask(database: Database) -> None:
    async def test() -> None:
        async with face(database) as here:
            (site,) = await deleted(here, 1)
            for scopes, expected in ((["sites:read"], 200), (["devices:read"], 403)):
                key = await here.key_with(*scopes)
                for path in ("", f"/{site}"):
                    assert (await ask(here, path, key=key))[0] == expected

    run(test())
