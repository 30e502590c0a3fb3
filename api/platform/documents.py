"""What describes the API: its OpenAPI document, the schemas in it, and a page to browse it; the page of mailed links.

The document follows from the declared operations; the pages' assets are packaged and ask no other host. Left out: how
the document is made (`api.http.openapi`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version as installed_version
from importlib.resources import files
from typing import Annotated, Any, Final

import msgspec
import orjson
import yaml

from api.faces import PLATFORM
from api.http.openapi import document
from api.http.operations import PUBLIC, Call, Nothing, Operation, Reply, operation
from api.http.problems import NOT_FOUND, Problem
from api.http.spelt import STORABLE
from api.platform.auth import ACCOUNT_PATH

YAML: Final = "application/yaml"
#: Paths are under whatever the document came from: what devices are told to send to may be another address.
SERVER: Final = "/"
_FOREVER: Final = {"Cache-Control": "public, max-age=300"}
#: A page runs nothing but what it is served with.
_PAGE: Final = {"Content-Security-Policy": "default-src 'self'", "Cache-Control": "public, max-age=300"}


class Named(msgspec.Struct):
    """Which schema."""

    name: Annotated[str, msgspec.Meta(extra_json_schema=STORABLE)]


class Schemas(msgspec.Struct):
    """The schemas there are."""

    data: list[str]


class DocumentOperations:
    """`/api/v3/api-docs`, `/api/schemas`, `/docs`, `/account`."""

    def __init__(self, described: Sequence[Mapping[str, Any]] = ()) -> None:
        self._described = described
        self.operations: Sequence[Operation] = ()
        """What is described: all of them, once they are known."""

    @cached_property
    def _document(self) -> dict[str, Any]:
        version = installed_version("sluice")
        return document(self.operations, version=version, server=SERVER, last=PLATFORM, described=self._described)

    @cached_property
    def _json(self) -> bytes:
        return orjson.dumps(self._document)

    @cached_property
    def _yaml(self) -> bytes:
        # Read anew, since YAML would write a part that stands in two places as a reference.
        return yaml.safe_dump(orjson.loads(self._json), sort_keys=False, allow_unicode=True).encode()

    @operation(PLATFORM, "GET", "/api/v3/api-docs", PUBLIC)
    async def api_docs(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[dict[str, Any]]:
        """The OpenAPI document"""
        return Reply(self._json, headers=_FOREVER)

    @operation(PLATFORM, "GET", "/api/v3/api-docs.yaml", PUBLIC, content_type=YAML)
    async def api_docs_yaml(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[dict[str, Any]]:
        """The OpenAPI document, as YAML"""
        return Reply(self._yaml, headers=_FOREVER)

    @operation(PLATFORM, "GET", "/api/schemas", PUBLIC)
    async def schemas(self, call: Call[Nothing, Nothing, Nothing]) -> Schemas:
        """The names of the JSON Schemas"""
        return Schemas(sorted(self._document["components"]["schemas"]))

    @operation(PLATFORM, "GET", "/api/schemas/{name}", PUBLIC, content_type="application/schema+json")
    async def schema(self, call: Call[Named, Nothing, Nothing]) -> Reply[dict[str, Any]]:
        """One JSON Schema, with those it refers to"""
        schemas = self._document["components"]["schemas"]
        if call.path.name not in schemas:
            raise Problem(NOT_FOUND, "no such schema")
        # References lead into the document itself, so that the schema stands alone.
        whole = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **schemas[call.path.name],
            "components": {"schemas": schemas},
        }
        return Reply(orjson.dumps(whole), headers=_FOREVER)

    @operation(PLATFORM, "GET", "/docs", PUBLIC, content_type="text/html")
    async def docs(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """A page to browse the API"""
        return Reply(_asset("docs.html"), headers=_PAGE)

    @operation(PLATFORM, "GET", "/docs/docs.js", PUBLIC, content_type="text/javascript")
    async def docs_script(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The page's script"""
        return Reply(_asset("docs.js"), headers=_PAGE)

    @operation(PLATFORM, "GET", "/docs/docs.css", PUBLIC, content_type="text/css")
    async def docs_style(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The page's style"""
        return Reply(_asset("docs.css"), headers=_PAGE)

    @operation(PLATFORM, "GET", "/docs/docs.svg", PUBLIC, content_type="image/svg+xml")
    async def docs_icon(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The page's icon"""
        return Reply(_asset("docs.svg"), headers=_PAGE)

    @operation(PLATFORM, "GET", ACCOUNT_PATH, PUBLIC, content_type="text/html")
    async def account(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The page that the links of invitations and forgotten passwords open"""
        return Reply(_asset("account.html"), headers=_PAGE)

    @operation(PLATFORM, "GET", f"{ACCOUNT_PATH}/account.js", PUBLIC, content_type="text/javascript")
    async def account_script(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """That page's script"""
        return Reply(_asset("account.js"), headers=_PAGE)

    @operation(PLATFORM, "GET", f"{ACCOUNT_PATH}/account.css", PUBLIC, content_type="text/css")
    async def account_style(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """That page's style"""
        return Reply(_asset("account.css"), headers=_PAGE)


def _asset(name: str) -> bytes:
    return files("api.assets").joinpath(name).read_bytes()
