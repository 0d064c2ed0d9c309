"""Records and seals: one value, one byte string, and no byte of it can change unseen."""

import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.algorithm.replica import StateDigest
from diloco_ray.coordination.messages import DataRange, Share
from diloco_ray.errors import CorruptionError
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.log.record import Record, model_digest, payload_path, seal, unseal

bodies = st.dictionaries(
    st.text().filter(lambda key: key != "sha256"),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    max_size=4,
)

SHARE = Share("island-00", 1, 4, 3, 100.0, 100, (DataRange(0, 0, 8, 12),), "a" * 64, 10, 0.5)
RECORD = Record(
    index=5,
    parent="b" * 64,
    run_id="run",
    fence_epoch=2,
    kind="outer_step",
    fragment=0,
    version=5,
    round=5,
    codec="int8",
    payload=payload_path(5, "c" * 64),
    payload_sha256="c" * 64,
    shares=(SHARE, replace(SHARE, island="island-01", spent=())),
    parameters_digest="d" * 32,
    optimizer_digest="e" * 32,
    tokens={"leased": 3, "committed": 3},
)


@given(bodies)
def test_a_seal_opens_to_what_was_sealed(body: dict[str, object]):
    try:
        data = seal(body)
    except UnicodeEncodeError:  # half a surrogate pair has no bytes
        return
    assert unseal(data, "x") == body
    assert data.endswith(b"}\n")
    assert data.count(b"\n") == 1


@given(st.data())
def test_one_changed_byte_breaks_the_seal(data: st.DataObject):
    sealed = bytearray(RECORD.to_bytes())
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptionError) as caught:
        unseal(bytes(sealed), "log/5.json")
    assert caught.value.where == "log/5.json"


@given(st.binary(max_size=200))
def test_no_bytes_crash_a_reader(data: bytes):
    with pytest.raises(CorruptionError):
        unseal(data, "x")


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{}", b'{"sha256":null}', seal({"a": 1})[:-1], b" " + seal({"a": 1}), b"[" * 100_000],
    ids=["empty", "null", "list", "no seal", "null seal", "no newline", "a space", "deep"],
)
def test_these_are_not_sealed(data: bytes):
    with pytest.raises(CorruptionError):
        unseal(data, "x")


def test_a_second_field_of_one_name_is_damage():
    body = seal({"a": 1}).replace(b'{"a":1', b'{"a":2,"a":1')
    with pytest.raises(CorruptionError):
        unseal(body, "x")


def test_a_body_brings_no_seal_of_its_own():
    with pytest.raises(ValueError, match="sha256"):
        seal({"sha256": "x"})


def test_a_record_goes_through_its_bytes_unchanged():
    data = RECORD.to_bytes()
    assert Record.from_bytes(data, "x") == RECORD
    assert Record.from_bytes(data, "x").to_bytes() == data
    assert RECORD.digest() == sha256_hex(data)


def test_a_record_travels_to_another_process():
    assert pickle.loads(pickle.dumps(RECORD)) == RECORD


def test_a_record_can_be_read_by_a_person():
    body = json.loads(RECORD.to_bytes())
    assert body["shares"][0]["spent"] == [{"shard": 0, "epoch": 0, "start": 8, "stop": 12}]
    assert body["payload"] == "payloads/00000005-cccccccccccc.bin"
    assert body["sha256"] == sha256_hex(canonical_json({k: v for k, v in body.items() if k != "sha256"}))


def test_an_integer_weight_gives_the_bytes_of_the_float():
    whole = replace(RECORD, shares=(replace(SHARE, weight=100),))
    assert whole.to_bytes() == replace(RECORD, shares=(SHARE,)).to_bytes()
    assert Record.from_bytes(whole.to_bytes(), "x") == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": "5"}, "version"),
        ({"kind": "rewind"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"shares": [{"island": "x"}]}, "shares.0"),
        ({"tokens": {"leased": 1.5}}, "tokens.leased"),
    ],
)
def test_a_sealed_record_of_another_format_names_the_field(change: dict[str, object], named: str):
    body = {k: v for k, v in json.loads(RECORD.to_bytes()).items() if k != "sha256"}
    with pytest.raises(CorruptionError, match=named):
        Record.from_bytes(seal({**body, **change}), "log/5.json")


def test_a_value_that_is_not_finite_is_not_recorded():
    with pytest.raises(ValueError, match="JSON"):
        replace(RECORD, shares=(replace(SHARE, norm=float("nan")),)).to_bytes()


def test_the_digest_of_one_fragment_is_the_models():
    one, two = StateDigest("a" * 32, "b" * 32), StateDigest("c" * 32, "d" * 32)
    assert model_digest([one]) == one
    assert model_digest([one, two]) != model_digest([two, one])
    assert len(model_digest([one, two]).parameters) == 32
