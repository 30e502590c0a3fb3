"""Sites as operations: made, listed, shown, changed, erased. Left out: their servers and edge devices."""

from typing import Any, Final
from uuid import UUID

import msgspec

from api.access.scopes import SITES_READ, SITES_WRITE
from api.faces import SITES
from api.http.lists import Cursors, cut
from api.http.operations import Call, Example, Nothing, Reply, Role, needs, operation
from api.http.problems import STALE
from api.problems import SITE_NOT_FOUND, SLUG_TAKEN
from api.registry import gateways, sites
from api.settings import ApiSettings
from api.sites import examples
from api.sites.shapes import (
    CreatedSite,
    ErasedSite,
    FullSite,
    ListedSite,
    ListedSites,
    OfOrganisation,
    OfSite,
    SitesPage,
    SiteToCreate,
    SiteToUpdate,
)
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/organisations/{orgId}/sites"
ONE: Final = f"{PATH}/{{siteId}}"
READS: Final = needs(Role.VIEWER, SITES_READ)
CHANGES: Final = needs(Role.ADMIN, SITES_WRITE)
ERASES: Final = needs(Role.OWNER, SITES_WRITE)


class Place(msgspec.Struct):
    """Where a page ended."""

    site: UUID


class SiteOperations:
    """`/api/organisations/{orgId}/sites`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "sites cursor"), Place)
        self._domain = sites.checked_domain(settings.site_domain)
        self._silence_s = settings.site_silence_s
        self._edges_max = settings.site_edges_max

    @operation(
        SITES, "POST", PATH, CHANGES, status=201, problems=[SLUG_TAKEN], repeatable=True,
        example=Example(examples.SITE_TO_CREATE, examples.CREATED_SITE),
    )  # fmt: skip
    async def create_site(self, call: Call[OfOrganisation, Nothing, SiteToCreate]) -> Reply[CreatedSite]:
        """Create a site

        Its `url` is made from its slug. Where another organisation has that one, it gets a short random ending.
        """
        site = await sites.create(call.connection, call.organisation, call.body.new)
        row = await sites.get(call.connection, site, self._silence_s)
        where = {"Location": ONE.format(orgId=call.organisation, siteId=site)}
        return Reply(CreatedSite.of(row, self._domain), version=str(row["version"]), headers=where)

    @operation(SITES, "GET", PATH, READS, example=Example(answer=examples.LISTED_SITES))
    async def list_sites(self, call: Call[OfOrganisation, SitesPage, Nothing]) -> ListedSites:
        """List the sites of an organisation

        All of them, up to a bound; `nextCursor` leads to the rest where there is one.
        """
        mark = (call.organisation, "sites")
        after = self._cursors.take(mark, call.query.cursor)
        limit = call.query.limit
        found = await sites.find(call.connection, self._silence_s, limit + 1, None if after is None else after.site)
        rows, more = cut(found, limit)
        page = ListedSites([ListedSite.of(row, self._domain) for row in rows])
        if more:
            page.next_cursor = self._cursors.give(mark, Place(rows[-1]["site_id"]))
        return page

    @operation(SITES, "GET", ONE, READS, missing=SITE_NOT_FOUND)
    async def get_site(self, call: Call[OfSite, Nothing, Nothing]) -> Reply[FullSite]:
        """Get a site in full

        With how far its provisioning has come, its server, and its edge devices.
        """
        return await self._whole(call)

    @operation(
        SITES, "PUT", ONE, CHANGES, missing=SITE_NOT_FOUND, problems=[STALE],
        example=Example(examples.SITE_TO_UPDATE),
    )  # fmt: skip
    async def update_site(self, call: Call[OfSite, Nothing, SiteToUpdate]) -> Reply[FullSite]:
        """Change a site's name, time zone or location

        What is left out stays as it is.
        """
        await sites.change(call.connection, call.path.site_id, call.body.changes, call.versions)
        return await self._whole(call)

    @operation(SITES, "DELETE", ONE, ERASES, status=202, missing=SITE_NOT_FOUND, problems=[STALE])
    async def delete_site(self, call: Call[OfSite, Nothing, Nothing]) -> ErasedSite:
        """Erase a site with everything that was recorded there

        It is gone at once, and so are the tokens of its server, edge devices and gateways, and the devices that stand
        there for good; what was recorded while devices stood there is erased in the background, see
        `/api/v1/erasures`. This cannot be undone.
        """
        site = call.path.site_id
        await sites.begin_erasure(call.connection, site, call.versions)
        return ErasedSite(site)

    async def _whole(self, call: Call[OfSite, Nothing, Any]) -> Reply[FullSite]:
        site = call.path.site_id
        row = await sites.get(call.connection, site, self._silence_s)
        server = await gateways.server_of(call.connection, site)
        edges = await gateways.edges_of(call.connection, site, self._silence_s, self._edges_max)
        return Reply(FullSite.whole(row, self._domain, server, edges), version=str(row["version"]))
