"""Eclipse Mosquitto as the MQTT broker, from the distribution's packages.

Every client may connect and do everything: it listens on loopback only.
"""

import signal
import socket
from pathlib import Path

from .packages import need
from .state import State

# What it keeps and how much, as a broker of an installation.
KEEPING = Path(__file__).resolve().parents[2] / "mosquitto" / "conf.d" / "keeping.conf"
# Stay the user that started it: only that one may enter the state directory.
OWN = """
listener {port} 127.0.0.1
allow_anonymous true
user root
persistence_location {data}/
log_dest stderr
"""
ANSWER_SECONDS = 2.0

# MQTT 3.1.1, clean session, keep-alive 10 s, no client identifier.
CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
CONNACK_ACCEPTED = b"\x20\x02\x00\x00"
DISCONNECT = b"\xe0\x00"


class Mosquitto:
    name = "mosquitto"
    ports: tuple[str, ...] = ("mosquitto",)
    stop_signal = signal.SIGTERM

    def prepare(self, state: State) -> None:
        _program()
        data = state.home(self.name) / "data"
        data.mkdir(exist_ok=True)
        own = OWN.format(port=state.ports[self.name], data=data)
        _config(state).write_text(KEEPING.read_text() + own)

    def command(self, state: State) -> list[str]:
        return [_program(), "-c", str(_config(state))]

    def answers(self, state: State) -> bool:
        """Whether a CONNECT gets its CONNACK."""
        try:
            where = ("127.0.0.1", state.ports[self.name])
            with socket.create_connection(where, ANSWER_SECONDS) as connection:
                connection.sendall(CONNECT)
                accepted = connection.recv(len(CONNACK_ACCEPTED)) == CONNACK_ACCEPTED
                connection.sendall(DISCONNECT)
                return accepted
        except OSError:
            return False

    def complete(self, state: State) -> None:
        """Topics come to be when someone publishes to them."""

    def release(self, state: State) -> None:
        """Nothing is held outside the state directory."""

    def exports(self, state: State) -> dict[str, str]:
        return {"SLUICE_MQTT_URL": f"mqtt://127.0.0.1:{state.ports[self.name]}"}


def _program() -> str:
    return need("mosquitto", ["mosquitto", "mosquitto-clients"], service="mosquitto")


def _config(state: State) -> Path:
    return state.home("mosquitto") / "mosquitto.conf"
