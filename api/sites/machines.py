"""The machines of a site as operations: registered, removed, heard. Left out: the sites themselves."""

from typing import Any, Final

from api.access.signing import Signer
from api.faces import SITES
from api.http.operations import SITE, Call, Example, Nothing, operation
from api.problems import (
    EDGE_ID_TAKEN,
    EDGE_LIMIT,
    EDGE_NOT_FOUND,
    SERVER_MISSING,
    SERVER_NOT_FOUND,
    SERVER_REGISTERED,
    SITE_NOT_FOUND,
)
from api.registry import gateways
from api.registry.credentials import Credentials
from api.registry.gateways import Gateways
from api.settings import ApiSettings
from api.sites import examples
from api.sites.shapes import (
    EdgeConfig,
    EdgeToRegister,
    Heartbeat,
    OfEdge,
    OfSite,
    RegisteredEdge,
    RegisteredServer,
    ServerConfig,
    ServerToRegister,
)
from api.sites.sites import CHANGES, ONE
from runtime.secrets import TokenHasher

EDGE: Final = f"{ONE}/edge-devices/{{edgeId}}"
_MISSING: Final = {"siteId": SITE_NOT_FOUND, "edgeId": EDGE_NOT_FOUND}


class MachineOperations:
    """What a site's server and edge devices begin with, and go on telling."""

    def __init__(self, signer: Signer, hasher: TokenHasher, settings: ApiSettings) -> None:
        self._signer = signer
        self._hasher = hasher
        self._port = settings.site_server_port
        self._edges_max = settings.site_edges_max

    @operation(
        SITES, "POST", f"{ONE}/register-server", CHANGES, missing=SITE_NOT_FOUND, problems=[SERVER_REGISTERED],
        repeatable=True, example=Example(examples.SERVER_TO_REGISTER, examples.REGISTERED_SERVER),
    )  # fmt: skip
    async def register_server(self, call: Call[OfSite, Nothing, ServerToRegister]) -> RegisteredServer:
        """Register a site's server

        The same hardware again gets a new token, and its old one ends.
        """
        site, body = call.path.site_id, call.body
        token = await self._gateways(call).register_server(
            site, body.hardware_id.value, body.hostname.value, body.version.value
        )
        return RegisteredServer(token, ServerConfig(call.organisation, site))

    @operation(
        SITES, "POST", f"{ONE}/register-edge", CHANGES, status=201, missing=SITE_NOT_FOUND,
        problems=[EDGE_ID_TAKEN, SERVER_MISSING, EDGE_LIMIT], repeatable=True,
        example=Example(examples.EDGE_TO_REGISTER, examples.REGISTERED_EDGE),
    )  # fmt: skip
    async def register_edge(self, call: Call[OfSite, Nothing, EdgeToRegister]) -> RegisteredEdge:
        """Register an edge device at a site

        The same hardware again gets a new token, and its old one ends.
        """
        site, body = call.path.site_id, call.body
        token, hostname = await self._gateways(call).register_edge(
            site, body.edge_id.value, body.hardware_id.value, body.version.value, self._edges_max
        )
        return RegisteredEdge(token, f"https://{hostname}:{self._port}", EdgeConfig())

    @operation(
        SITES, "DELETE", f"{ONE}/server", CHANGES, status=204, missing=SITE_NOT_FOUND, problems=[SERVER_NOT_FOUND]
    )
    async def remove_server(self, call: Call[OfSite, Nothing, Nothing]) -> None:
        """Remove a site's server

        Its token ends, and another hardware may be registered.
        """
        await gateways.remove_server(call.connection, self._credentials(call), call.path.site_id)

    @operation(SITES, "DELETE", EDGE, CHANGES, status=204, missing=_MISSING)
    async def remove_edge(self, call: Call[OfEdge, Nothing, Nothing]) -> None:
        """Remove an edge device from a site

        Its token ends, and another hardware may be registered under its id.
        """
        path = call.path
        await gateways.remove_edge(call.connection, self._credentials(call), path.site_id, path.edge_id)

    @operation(
        SITES, "POST", f"{ONE}/heartbeat", SITE, status=204, missing=SITE_NOT_FOUND,
        example=Example(examples.HEARTBEAT),
    )  # fmt: skip
    async def heartbeat(self, call: Call[OfSite, Nothing, Heartbeat]) -> None:
        """Tell that a server or edge device runs, and what

        With its own token. A site whose server was heard within the last 90 seconds (a setting) is online.
        """
        gateways.check_own(call.path.site_id, call.caller.site)
        await gateways.hear(call.connection, call.caller.credential, call.body.version.value, call.body.process_count)

    def _gateways(self, call: Call[OfSite, Nothing, Any]) -> Gateways:
        return Gateways(call.connection, call.organisation, self._credentials(call), self._signer)

    def _credentials(self, call: Call[Any, Nothing, Any]) -> Credentials:
        return Credentials(call.connection, self._hasher)
