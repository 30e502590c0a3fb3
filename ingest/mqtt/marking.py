"""What a record carries so that landing knows it when it comes again: how it was delivered, or a snapshot's nonce.

Pure. Left out: what landing makes of it (`workers.landing.deliveries`).
"""

import struct
from hashlib import blake2b

import msgspec

from ingest.admit import Admitted
from ingest.mqtt.connection import Connection, Message
from ingest.mqtt.snapshots import Snapshot
from schemas import record as records
from schemas.record import TIME_MADE_UP, Channel, Delivery, Quality, Record


def with_nonce(admitted: Admitted, snapshot: Snapshot) -> Admitted:
    """Named by its nonce, so that landing knows it again; what is late says so."""
    record = admitted.record
    channels = [_late(channel) for channel in record.channels] if snapshot.is_late else record.channels
    named = msgspec.structs.replace(
        record, version=records.LATE_VERSION, idempotency=snapshot.nonce, channels=channels
    )
    return Admitted(named, admitted.accepted, admitted.rejections)


def _late(channel: Channel) -> Channel:
    flags = [one | Quality.LATE.value for one in channel.unpack_quality()]
    quality: int | bytes = flags[0] if len(set(flags)) == 1 else struct.pack(f">{len(flags)}h", *flags)
    return msgspec.structs.replace(channel, quality=quality)


def delivery_of(connection: Connection, message: Message, partition: int) -> Delivery:
    """By what landing knows the message again."""
    window = connection.window
    digest = blake2b(message.topic + b"\0" + message.payload, digest_size=8).digest()
    where = message.number, window.began, window.floor(partition)
    return Delivery(window.session, message.packet, message.again, digest, *where)


def is_made_up(record: Record) -> bool:
    """Whether a time of it is ours: it will have another one when it comes again."""
    for channel in record.channels:
        quality = channel.quality
        if type(quality) is int:
            if quality & TIME_MADE_UP:
                return True
        elif any(flags & TIME_MADE_UP for flags in channel.unpack_quality()):
            return True
    return False
