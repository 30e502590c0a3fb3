"""A yardstick: a routed aiohttp application that decodes what it is sent, answers, and does nothing else.

`python -m bench.bare_server PORT`. Like ingest on uvloop and without an access log; its answer is as short as can be.
"""

import sys
from typing import Final

import orjson
import uvloop
from aiohttp import web

ANSWER: Final = b'{"accepted":%d,"bare":true}'


async def post(request: web.Request) -> web.Response:
    found = orjson.loads(await request.read())
    return web.Response(status=202, body=ANSWER % len(found["measurements"]))


async def get(request: web.Request) -> web.Response:
    found = dict(request.query)
    return web.Response(status=202, body=ANSWER % len(found))


async def ready(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/ingest", post)
    app.router.add_get("/v1/ingest/shelly/{token}", get)
    app.router.add_get("/ready", ready)
    web.run_app(
        app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, loop=uvloop.new_event_loop()
    )


if __name__ == "__main__":
    main()
