"""The command line: what it accepts, and the order in which parts are started and stopped.

Standard output carries only what a caller evaluates or reads; progress goes to standard error.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from .errors import ServicesError
from .kafka import Kafka
from .locks import locked
from .mosquitto import Mosquitto
from .packages import say
from .part import Part
from .processes import kill, spawn, stop, wait_until
from .prometheus import PROGRAMS, program
from .state import STATE, State, port_in_use
from .timescaledb import TimescaleDB, choose_small_disk
from .tls import choose_tls

CHECKOUT = Path(__file__).resolve().parents[3]
# The slowest to answer goes first, so that it gets ready while the others are laid out.
PARTS: dict[str, Part] = {part.name: part for part in (Kafka(), TimescaleDB(), Mosquitto())}
LOCK = "lock"
Command = Callable[[State, argparse.Namespace], int]
# A killed database may have gigabytes of its log to replay.
START_SECONDS = 300.0
# A broker that closes its segments and a database that checkpoints both need some seconds.
STOP_SECONDS = 60.0


def main() -> int:
    arguments = _parser().parse_args()
    command: Command = arguments.command
    directory = Path(os.path.abspath(arguments.dir))
    # Whoever only reads need not wait for a long start: the state file is replaced as a whole.
    reads = command in (_status, _env, _pid, _path)
    try:
        with nullcontext() if reads else locked(directory / LOCK):
            return command(State.load(directory), arguments)
    except ServicesError as error:
        print(f"services: {error}", file=sys.stderr)
        return 1


def _start(state: State, arguments: argparse.Namespace) -> int:
    if arguments.small_disk:
        choose_small_disk(state)
    if arguments.tls:
        choose_tls(state)
    # In our own order, whichever the caller's.
    for name in [name for name in PARTS if name in arguments.names]:
        if name == Kafka.name:
            _advertise(state, arguments.kafka_advertise)
        if state.running(name) is None:
            _launch(state, PARTS[name])
    for name in arguments.names:
        _await(state, PARTS[name])
    return _env(state, arguments)


def _advertise(state: State, port: int | None) -> None:
    """A running broker keeps what it advertises unless the caller asks for something else."""
    running = state.running(Kafka.name) is not None
    if running and port in (None, state.kafka_advertise):
        return
    if running:
        _halt(state, PARTS[Kafka.name])
    state.kafka_advertise = port


def _launch(state: State, part: Part) -> None:
    state.choose_ports(part.ports)
    for name in part.ports:
        if port_in_use(state.ports[name]):
            raise ServicesError(
                f"port {state.ports[name]} of {part.name} is taken by another program: "
                "end that, or `services wipe` to have new ports chosen"
            )
    part.prepare(state)
    say(f"starting {part.name}")
    state.processes[part.name] = spawn(part.command(state), state.log(part.name))
    state.save()


def _await(state: State, part: Part) -> None:
    process = state.processes[part.name]
    log = state.log(part.name)
    try:
        wait_until(lambda: part.answers(state), process, log, START_SECONDS)
    except ServicesError as error:
        raise ServicesError(f"{part.name}: {error}") from None
    part.complete(state)


def _halt(state: State, part: Part) -> None:
    if (process := state.running(part.name)) is not None:
        say(f"stopping {part.name}")
        stop(process, part.stop_signal, STOP_SECONDS)
    part.release(state)


def _stop(state: State, arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        _halt(state, PARTS[name])
    return 0


def _restart(state: State, arguments: argparse.Namespace) -> int:
    _stop(state, arguments)
    return _start(state, arguments)


def _kill(state: State, arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        if (process := state.running(name)) is None:
            raise ServicesError(f"{name} is not running: nothing to kill")
        kill(process)
    return 0


def _wipe(state: State, arguments: argparse.Namespace) -> int:
    _stop(state, arguments)
    # Only what is ours: a mistyped --dir may name any directory.
    for name in (*PARTS, "tls"):
        shutil.rmtree(state.directory / name, ignore_errors=True)
    for file in (STATE, LOCK):
        (state.directory / file).unlink(missing_ok=True)
    with suppress(OSError):
        state.directory.rmdir()
    return 0


def _status(state: State, arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        port = state.ports.get(name, "-")
        process = state.running(name)
        what = f"running  pid {process.pid}" if process else "stopped  pid -"
        print(f"{name:<12} {what}  port {port}")
    return 0 if all(state.running(name) for name in arguments.names) else 1


def _env(state: State, arguments: argparse.Namespace) -> int:
    for part in PARTS.values():
        if state.running(part.name) is not None:
            for variable, value in part.exports(state).items():
                print(f"export {variable}={shlex.quote(value)}")
    return 0


def _pid(state: State, arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        if (process := state.running(name)) is None:
            raise ServicesError(f"{name} is not running")
        print(process.pid)
    return 0


def _path(state: State, arguments: argparse.Namespace) -> int:
    for name in arguments.programs:
        print(program(name))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="services",
        description="Kafka, TimescaleDB and Mosquitto on this machine, on loopback.",
        epilog='eval "$(deploy/local/services start)" starts all three and tells the shell.',
    )
    common = argparse.ArgumentParser(add_help=False)
    for where, default in ((parser, CHECKOUT / ".services"), (common, argparse.SUPPRESS)):
        where.add_argument("--dir", default=default, help="state directory (.services in the checkout)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, nargs: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, parents=[common], help=text, description=text)
        command.set_defaults(command=run, names=list(PARTS))
        if nargs:
            command.add_argument("names", nargs=nargs, metavar="NAME", type=_name)
        return command

    start = add("start", _start, "*", "install, start, wait for an answer, print exports")
    start.add_argument("--small-disk", action="store_true", help="a new database on a 512 MB disk of its own")
    add("stop", _stop, "*", "end gracefully, or by force when that takes too long")
    restart = add("restart", _restart, "+", "stop and start: same data, same port")
    start.add_argument(
        "--tls", action="store_true", help="new parts with TLS: logins for Kafka, and exports that ask for both"
    )
    restart.set_defaults(small_disk=False, tls=False)
    for command in (start, restart):
        command.add_argument(
            "--kafka-advertise",
            type=int,
            metavar="PORT",
            help="until its next start, send clients to 127.0.0.1:PORT, where a test's proxy listens",
        )
    add("kill", _kill, "+", "SIGKILL the whole part, to be recovered by a later start")
    add("wipe", _wipe, "", "stop everything and delete its data; downloads are kept")
    add("status", _status, "*", "what runs, its pid and port; fails unless all of it runs")
    add("env", _env, "", "print the export lines of what runs")
    add("pid", _pid, "+", "print the process id")
    path = add("path", _path, "", "print where a program beside the parts is, installed if it is missing")
    path.add_argument("programs", nargs="+", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    return parser


def _name(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PARTS)}")
    return text
