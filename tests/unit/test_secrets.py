"""Keys, token hashes, tokens and seals: what they make is read by those who may, and by nobody else."""

import base64
import hmac
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigurationError
from runtime.secrets import (
    API_KEY_PREFIX,
    DEVICE_PREFIX,
    BadSealError,
    Key,
    KeyRing,
    Seal,
    TokenHasher,
    kept_keys,
    make_token,
    new_ring,
    plausible_token,
    without_secrets_in_bytes,
    without_secrets_in_json,
)

RING = KeyRing((Key(7, bytes(range(32))), Key(3, bytes(range(1, 33)))))


def text_of(secret: bytes) -> str:
    return base64.urlsafe_b64encode(secret).rstrip(b"=").decode()


def test_a_ring_is_read_as_it_is_written() -> None:
    ring = new_ring().rotated().rotated()
    assert KeyRing.parse(str(ring)) == ring
    assert [key.id for key in ring.keys] == [3, 2, 1]


def test_a_new_key_takes_an_id_that_is_free() -> None:
    ring = KeyRing((Key(255, bytes(32)), Key(1, bytes(32))))
    assert ring.rotated().keys[0].id == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not set: `sluice token keys`"),
        ("abc", "list of id:key"),
        (f"256:{text_of(bytes(32))}", "list of id:key"),
        (f"-1:{text_of(bytes(32))}", "list of id:key"),
        ("1:***", "key 1 is not base64url"),
        (f"1:{text_of(bytes(31))}", "key 1 has 31 bytes"),
        (f"1:{text_of(bytes(32))},1:{text_of(bytes(32))}", "same id"),
        (",".join(f"{number}:{text_of(bytes(32))}" for number in range(17)), "at most 16"),
    ],
)
def test_a_bad_ring_is_refused_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        KeyRing.parse(text)
    assert "AAAA" not in str(raised.value)


def test_a_ring_does_not_show_its_keys() -> None:
    assert repr(RING) == "KeyRing(ids=[7, 3])"


def test_the_file_of_keys_is_private_and_made_once_whoever_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "secret-keys"
    with ThreadPoolExecutor(8) as threads:
        rings = set(threads.map(lambda _: kept_keys(path), range(8)))
    assert len(rings) == 1
    assert kept_keys(path) in rings
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["secret-keys"]


def test_a_file_of_keys_that_cannot_be_kept_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be kept"):
        kept_keys(tmp_path / "absent" / "secret-keys")


@given(st.text())
def test_a_digest_is_hmac_sha_256_under_the_key_of_its_purpose(token: str) -> None:
    hasher = TokenHasher(RING)
    body = token.encode("utf-8", "surrogatepass")
    expected = [hmac.digest(key.derive("tokens"), body, "sha256") for key in RING.keys]
    assert hasher.digests(token) == expected
    assert hasher.digest(token) == expected[0]


def test_keys_of_different_purposes_and_rings_differ() -> None:
    derived = {key.derive(purpose) for key in RING.keys for purpose in ("tokens", "seal receipt", "seal cursor")}
    assert len(derived) == 6


@pytest.mark.parametrize("prefix", [DEVICE_PREFIX, API_KEY_PREFIX])
def test_a_token_is_plausible_under_its_own_prefix_only(prefix: str) -> None:
    token = make_token(prefix)
    assert plausible_token(token, prefix)
    assert token.startswith(prefix)
    assert len(token) == len(prefix) + 36
    assert not plausible_token(token, "xx_live_")
    assert token != make_token(prefix)


@given(st.integers(0, 43), st.characters())
def test_one_wrong_character_is_noticed(place: int, character: str) -> None:
    token = make_token(DEVICE_PREFIX)
    changed = token[:place] + character + token[place + 1 :]
    assert plausible_token(changed, DEVICE_PREFIX) == (changed == token)


@given(st.text())
def test_no_text_breaks_the_check(text: str) -> None:
    assert not plausible_token(text, DEVICE_PREFIX)
    assert not plausible_token(DEVICE_PREFIX + text, DEVICE_PREFIX)


@given(st.binary(max_size=300))
def test_a_seal_opens_to_what_was_sealed(plain: bytes) -> None:
    seal = Seal(RING, "test")
    text = seal.seal(plain)
    assert seal.open(text) == plain
    assert text != seal.seal(plain), "the same nonce twice"
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(st.one_of(st.text(), st.binary().map(text_of)))
def test_nothing_else_opens(text: str) -> None:
    with pytest.raises(BadSealError):
        Seal(RING, "test").open(text)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, flip: int) -> None:
    seal = Seal(RING, "test")
    raw = bytearray(base64.urlsafe_b64decode(seal.seal(b"what it says") + "=="))
    raw[place % len(raw)] ^= flip
    with pytest.raises(BadSealError):
        seal.open(text_of(bytes(raw)))


def test_a_seal_is_for_one_purpose_and_survives_a_rotation() -> None:
    text = Seal(RING, "receipt").seal(b"x")
    with pytest.raises(BadSealError):
        Seal(RING, "cursor").open(text)
    rotated = RING.rotated()
    assert Seal(rotated, "receipt").open(text) == b"x"
    with pytest.raises(BadSealError):
        Seal(KeyRing(rotated.keys[:1]), "receipt").open(text)


def test_tokens_hashed_under_an_older_key_are_still_found() -> None:
    token = make_token(DEVICE_PREFIX)
    stored = TokenHasher(RING).digest(token)
    assert stored in TokenHasher(RING.rotated()).digests(token)


def test_two_seals_of_one_process_do_not_share_nonces() -> None:
    seals = [Seal(RING, "test") for _ in range(50)]
    nonces = {base64.urlsafe_b64decode(seal.seal(b"") + "==")[1:13] for seal in seals for _ in range(20)}
    assert len(nonces) == 1000


TOKEN = "gw_live_0123456789abcdefghijABCDEFGHIJ012345"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f'{{"a":"{TOKEN}","b":"\\u00b0C \\n"}}', '{"a":"***","b":"\\u00b0C \\n"}'),
        (f'["\\u0067{TOKEN[1:]}"]', '["***"]'),
        (f'["{TOKEN.replace("_", chr(92) + "u005f")}x\\u0022"]', '["***\\u0022"]'),
        # Nothing is changed where nothing is blotted out, and an escaped backslash begins no escape.
        ('["\\u0061\\u005f"]', '["\\u0061\\u005f"]'),
        (f'["\\\\u0067{TOKEN[1:]}"]', f'["\\\\u0067{TOKEN[1:]}"]'),
    ],
)
def test_tokens_in_json_are_blotted_out_however_they_are_spelt(text: str, left: str) -> None:
    json.loads(text)
    assert without_secrets_in_json(text) == left


def test_tokens_in_bytes_are_blotted_out() -> None:
    assert without_secrets_in_bytes(b"\xff\x00" + TOKEN.encode() + b"\xd9") == b"\xff\x00***\xd9"
    assert without_secrets_in_bytes(b"\xffeyJh.eyJz.c2ln\xff_live_") == b"\xff***\xff_live_"
