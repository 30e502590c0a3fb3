"""What the document of the Sites face prints is what its operations take and give, field by field."""

from typing import Any

import msgspec
import pytest

from api.access.signing import Signer
from api.faces import PLATFORM
from api.http import spelt
from api.http.decoding import read_body
from api.http.openapi import document
from api.http.operations import Operation, operations_of
from api.settings import ApiSettings
from api.sites.machines import MachineOperations
from api.sites.sites import SiteOperations
from runtime.secrets import TokenHasher, new_ring

RING = new_ring()
SETTINGS = ApiSettings()
OPERATIONS = list(
    operations_of(
        SiteOperations(RING, SETTINGS),
        MachineOperations(Signer(RING, issuer="test"), TokenHasher(RING), SETTINGS),
    )
)


def in_json(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=spelt.write))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_examples_are_of_the_declared_shapes(operation: Operation) -> None:
    request, answer = operation.example
    if request is not None:
        read = in_json(read_body(operation.body_type, msgspec.json.encode(request)))
        assert {name: value for name, value in read.items() if name in request} == request
    if answer is not None:
        assert in_json(msgspec.convert(answer, operation.answer_type)) == answer


def test_every_operation_is_described() -> None:
    described = document(OPERATIONS, version="1", server="http://test", last=PLATFORM)
    assert len(OPERATIONS) == 10
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            statuses = set(operation["responses"])
            assert {"400", "401", "403", "404", "429"} <= statuses, (method, path)
    create = described["paths"]["/api/organisations/{orgId}/sites"]["post"]
    assert create["requestBody"]["content"]["application/json"]["example"]["slug"] == "mt-arthur"
    assert "409" in create["responses"]
