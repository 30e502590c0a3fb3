"""The description of the ingest face is held to the running one: its routes, its codes, its examples, its answers."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
from aiohttp import ClientSession

from ingest.formats import shelly_get
from ingest.http.description import described
from ingest.http.service import ROUTES
from schemas.errors import RequestCode
from tests.databases import Database
from tests.ingest_rig import Installation, Reply, head_of, measured
from tests.services.test_api_readings import world
from tests.support import run

DOCUMENT = described()
METHODS = {"get", "post", "put", "patch", "delete"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, found in DOCUMENT["paths"].items():
        for method in METHODS:
            if method in found:
                yield path, method, found[method]


def fits(schema: Any, content: Any) -> bool:
    """Whether content is of a schema of the document, in which it says nothing that the schema does not have."""
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema_rs.validator_for(whole).validate(content)
    if isinstance(content, dict) and "$ref" in schema:
        named: dict[str, Any] = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return set(content) <= set(named["properties"])
    return True


def test_every_route_is_described_with_its_methods(installation: Installation) -> None:
    found: dict[str, set[str]] = {}
    for path, method, _ in operations():
        found.setdefault(path, set()).add(method.upper())
    assert found == {path: set(methods) for path, methods in ROUTES.items()}

    async def test() -> None:
        async with installation.face() as face:
            for path, methods in ROUTES.items():
                told = await face.raw(head_of("OPTIONS", path.replace("{", "").replace("}", "")))
                assert told.headers["allow"] == ", ".join((*methods, "OPTIONS"))

    run(test())


def test_every_code_of_a_request_is_described() -> None:
    told = json.dumps(DOCUMENT)
    # Whoever meets these has not met an operation.
    elsewhere = {RequestCode.NOT_FOUND, RequestCode.METHOD_NOT_ALLOWED, RequestCode.NOT_IMPLEMENTED}
    assert {code for code in RequestCode if f"`{code}`: " not in told} == elsewhere


def test_every_parameter_of_a_query_is_described() -> None:
    for path in ("/v1/ingest", "/v1/ingest/shelly/{token}"):
        parameters = DOCUMENT["paths"][path]["get"]["parameters"]
        named = {one["name"] for one in parameters if one["in"] == "query"}
        assert named - {"token"} == {"device", "ts", *shelly_get.NUMBERS, *shelly_get.FLAGS, *shelly_get.TEXTS}
        for name in named - {"token", "device", "ts"}:
            value = "1" if name not in shelly_get.TEXTS else "x"
            (measurement,) = shelly_get.decode(f"{name}={value}").submission.measurements
            assert not hasattr(measurement, "code"), name


def test_its_examples_are_of_its_schemas() -> None:
    count = 0
    for path, method, operation in operations():
        medias = [answer["content"]["application/json"] for answer in operation["responses"].values()]
        if "requestBody" in operation:
            medias.append(operation["requestBody"]["content"]["application/json"])
        for media in medias:
            if "example" in media:
                assert fits(media["schema"], media["example"]), (path, method)
                count += 1
    assert count == 8


def test_what_it_says_is_what_is_answered(installation: Installation) -> None:
    def check(path: str, method: str, reply: Reply) -> Any:
        media = DOCUMENT["paths"][path][method]["responses"][str(reply.status)]["content"]["application/json"]
        assert fits(media["schema"], reply.json()), reply.body
        return media.get("example")

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            body = DOCUMENT["paths"]["/v1/ingest"]["post"]["requestBody"]["content"]["application/json"]["example"]
            reply = await face.post(tenant.token, body)
            example = check("/v1/ingest", "post", reply)
            assert reply.json() == example | {"receipt": reply.json()["receipt"]}
            for target in (f"/v1/ingest?token={tenant.token}", f"/v1/ingest/shelly/{tenant.token}?x=1"):
                reply = await face.get(f"{target}&temp=4.2")
                assert reply.status == 202
                check("/v1/ingest", "get", reply)
            receipt = reply.json()["receipt"]
            check("/v1/receipts/{receipt}", "get", await face.get(f"/v1/receipts/{receipt}", tenant.token))
            bad: list[Any] = [b"{", {"measurements": []}, measured(("temperature", 9999))]
            for wrong in bad:
                reply = await face.post(tenant.token, wrong)
                assert reply.status >= 400
                check("/v1/ingest", "post", reply)
            check("/v1/receipts/{receipt}", "get", await face.get("/v1/receipts/x", tenant.token))

    run(test())


def test_the_document_of_the_api_holds_it(database: Database) -> None:
    async def test() -> None:
        part = described("https://in.example.org")
        async with world(database, described=[part]) as here, ClientSession() as session:
            async with session.get(f"{here.url}/api/v3/api-docs") as answer:
                whole = await answer.json()
            for path in ROUTES:
                assert whole["paths"][path]["servers"] == [{"url": "https://in.example.org"}]
            assert {"Ingest", "Devices"} <= {tag["name"] for tag in whole["tags"]}
            assert {"IngestSubmission", "DevicesProblem"} <= set(whole["components"]["schemas"])
            assert {"bearer", "device"} <= set(whole["components"]["securitySchemes"])
            names = [
                path[method]["operationId"] for path in whole["paths"].values() for method in METHODS & path.keys()
            ]
            assert len(names) == len(set(names))
            # What comes before a path is read is refused in the shape of whatever face is last.
            unread = whole["paths"]["/v1/ingest"]["post"]["responses"]["400"]["content"]
            assert set(unread) == {"application/json", "application/problem+json"}
            assert part == described("https://in.example.org")

    run(test())
