"""The API describes itself: every operation is in the document, whose references lead somewhere, and on the page."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import yaml

from api.access.scopes import OWNER, SCOPES
from api.http.edge import OPERATIONS
from tests.databases import Database
from tests.services.test_api_readings import World, world
from tests.support import run

HTTP_METHODS = {"get", "post", "put", "patch", "delete"}


async def fetch(here: World, path: str, kind: str) -> str:
    async with here.session.get(f"{here.url}{path}") as answer:
        assert (answer.status, answer.content_type) == (200, kind), path
        return await answer.text()


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_document_holds_every_operation_in_json_and_yaml(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            found = json.loads(await fetch(here, "/api/v3/api-docs", "application/json"))
            assert yaml.safe_load(await fetch(here, "/api/v3/api-docs.yaml", "application/yaml")) == found
            assert found["openapi"] == "3.1.0"
            described = {(path, method) for path, methods in found["paths"].items() for method in methods}
            routed = {
                (route.resource.canonical, route.method.lower())
                for route in here.app.router.routes()
                if route.resource is not None and route.method.lower() in HTTP_METHODS
            }
            assert described == routed
            names = [one["operationId"] for methods in found["paths"].values() for one in methods.values()]
            assert len(names) == len(set(names)) > 60
            schemas = found["components"]["schemas"]
            assert {reference.rpartition("/")[2] for reference in references(found)} <= set(schemas)
            for path, methods in found["paths"].items():
                for one in methods.values():
                    placed = {parameter["name"] for parameter in one["parameters"] if parameter["in"] == "path"}
                    assert placed == set(re.findall(r"{(\w+)}", path)), path
                    assert one["summary"], path

    run(test())


def test_every_scope_is_one_that_an_operation_needs(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            assert {one.needs.scope for one in here.app[OPERATIONS]} - {""} | {OWNER} == set(SCOPES)

    run(test())


def test_the_documents_examples_are_of_their_operations_shapes(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            found = json.loads(await fetch(here, "/api/v3/api-docs", "application/json"))
            wrong = []
            examples = [*media_with_examples(found["paths"])]
            for where, media in examples:
                schema = media["schema"] | {"components": found["components"]}
                wrong += [(where, str(error)) for error in jsonschema_rs.iter_errors(schema, media["example"])]
            assert not wrong
            assert len(examples) > 10
            declared = [one.example for one in here.app[OPERATIONS]]
            assert len(examples) >= sum((one.request is not None) + (one.answer is not None) for one in declared)

    run(test())


def media_with_examples(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """What the page shows as the content of a request or an answer."""
    if isinstance(node, dict):
        if "example" in node and "schema" in node:
            yield where, node
        for name, value in node.items():
            yield from media_with_examples(value, f"{where} {name}")
    elif isinstance(node, list):
        for value in node:
            yield from media_with_examples(value, where)


def test_a_schema_stands_alone(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            names = json.loads(await fetch(here, "/api/schemas", "application/json"))["data"]
            assert "Readings" in names
            schema = json.loads(await fetch(here, "/api/schemas/Readings", "application/schema+json"))
            for reference in references(schema):
                assert reference.removeprefix("#/components/schemas/") in schema["components"]["schemas"]
            async with here.session.get(f"{here.url}/api/schemas/Nothing0") as answer:
                assert answer.status == 404

    run(test())


def test_tables_of_the_page_scroll_in_a_narrow_window(database: Database) -> None:
    """By hand: at 390 px a window of Chromium stays 390 px wide with every operation open, and was 437 px without."""

    async def test() -> None:
        async with world(database) as here:
            script = await fetch(here, "/docs/docs.js", "text/javascript")
            made = re.findall(r'element\("table"', script)
            boxed = re.findall(r'element\("div", { class: "scroll" }, element\("table"', script)
            assert len(made) == len(boxed) == 1
            assert ".scroll { overflow-x: auto; }" in await fetch(here, "/docs/docs.css", "text/css")

    run(test())


@pytest.mark.parametrize("name", ["docs", "account"])
def test_a_page_asks_no_other_host(name: str, database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            page = await fetch(here, f"/{name}", "text/html")
            for asset, kind in ((f"/{name}/{name}.js", "text/javascript"), (f"/{name}/{name}.css", "text/css")):
                assert asset in page
                assert "://" not in await fetch(here, asset, kind)
            assert "://" not in page
            assert "/docs/docs.svg" in page
            assert "<svg" in await fetch(here, "/docs/docs.svg", "image/svg+xml")

    run(test())
