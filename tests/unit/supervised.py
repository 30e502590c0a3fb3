"""A child for the tests of the supervisor: answers its pid on what it inherits.

`--refuse` ends it as a refused start does, `--never-ready` keeps it from getting ready, `--deaf` from ending.
"""

import asyncio
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import os

from prometheus_client import Counter, Gauge

from runtime.health import Health
from runtime.supervisor import EXIT_REFUSED, Inherited, report

ANSWERS = Counter("supervised_answers", "Answers given.")
SERVING = Gauge("supervised_serving", "Whether it serves.", multiprocess_mode="livesum")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if await reader.read(1):
        ANSWERS.inc()
        writer.write(str(os.getpid()).encode())
        await writer.drain()
    writer.close()


async def main(inherited: Inherited, never_ready: bool, deaf: bool) -> None:
    stop, health = asyncio.Event(), Health()
    if never_ready:
        health.register("part", lambda: "it never will be")
    reporting = asyncio.create_task(report(inherited.channel, health, stop))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if deaf else stop.set)
    SERVING.set(1)
    server = await asyncio.start_server(answer, sock=inherited.listeners[0])
    await stop.wait()
    server.close()
    # What was accepted is answered: up to Python 3.12.1 `wait_closed` does not wait for it.
    while answering := asyncio.all_tasks() - {asyncio.current_task(), reporting}:
        await asyncio.wait(answering)
    reporting.cancel()


if __name__ == "__main__":
    if "--refuse" in sys.argv:
        sys.exit(EXIT_REFUSED)
    asyncio.run(main(Inherited.parse(sys.argv[-1]), "--never-ready" in sys.argv, "--deaf" in sys.argv))
