"""Spans: export and import bit by bit, and every way to refuse a bad one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest
from tests.support.kv_world import BOTH, FULL, MIXED, World, make_spec

from elbowroom.errors import IntegrityError, OutOfBudget


def seal(header: bytes, payload: bytes = b"", magic: bytes = b"ELBKV\x00\x00\x03") -> bytes:
    """Return a span with a valid checksum around any header."""
    body = magic + struct.pack("<I", len(header)) + header + payload
    return body + hashlib.blake2b(body, digest_size=32).digest()


@BOTH
def test_span_round_trip_is_bit_equal(kind: type[World]):
    """A span imported elsewhere gives the same bits, goes on from there, and exports to the same bytes."""
    world = kind(MIXED)
    handle = world.open(300)
    world.append((handle, 5))
    span = world.store.export_span(handle, 0, 305)
    twin = world.open()
    assert world.store.import_span(twin, span) == 305
    world.refs[twin] = world.refs[handle].prefix(305)
    world.expire(twin, 305)
    world.check()
    assert world.store.export_span(twin, 0, 305) == span
    world.append((handle, 70), (twin, 70))
    world.check()


@BOTH
def test_spans_of_consecutive_blocks_make_up_a_sequence(kind: type[World]):
    """A prefix exported block by block is put together again block by block, windows or not."""
    world = kind(MIXED)
    handle = world.open()
    spans = []
    for stop in (64, 192, 256, 300):
        start = world.refs[handle].num_tokens
        world.append((handle, stop - start))
        spans.append(world.store.export_span(handle, start, stop))
    twin = world.open()
    added = []
    for span, stop in zip(spans, (64, 192, 256, 300), strict=True):
        added.append(world.store.import_span(twin, span))
        world.expire(twin, stop)
    assert added == [64, 128, 64, 44]
    world.refs[twin] = dataclasses.replace(world.refs[handle].prefix(300), expired=world.refs[twin].expired)
    world.check()
    world.append((twin, 40))
    world.check()


def test_import_replaces_blocks_of_a_step_that_never_ran():
    """A sequence whose last reserve was abandoned takes a span as if nothing had happened."""
    world = World([FULL])
    source, target = world.open(128), world.open()
    assert world.store.reserve(world.append_step((target, 100))) is None
    world.store.import_span(target, world.store.export_span(source, 0, 128))
    world.refs[target] = world.refs[source].prefix(128)
    world.check()
    assert world.store.report().num_strips == 4


@BOTH
def test_span_holds_nothing_of_other_sequences(kind: type[World]):
    """Slots behind the end of a span are zero, whatever a recycled strip held before."""
    world = kind([FULL])
    world.close(world.open(64))
    handle = world.open(3)
    span = world.store.export_span(handle, 0, 3)
    keys = np.frombuffer(span[-32 - 4096 : -32], dtype=np.float32).reshape(2, 64, 8)
    assert np.count_nonzero(keys[:, :3]) == 2 * 3 * 8
    assert np.count_nonzero(keys[:, 3:]) == 0


@BOTH
@pytest.mark.parametrize(("start", "stop"), [(1, 100), (64, 64), (0, 101), (-64, 64), (128, 100)])
def test_spans_that_are_none_are_refused(kind: type[World], start: int, stop: int):
    """A span starts at a block of the sequence and ends inside it."""
    world = kind([FULL])
    handle = world.open(100)
    with pytest.raises(IntegrityError, match="no span"):
        world.store.export_span(handle, start, stop)


@BOTH
def test_span_that_has_expired_is_refused(kind: type[World]):
    """Tokens that a window has dropped cannot be exported any more."""
    world = kind([make_spec(window=64)])
    handle = world.open(640)
    with pytest.raises(IntegrityError, match="sliding window"):
        world.store.export_span(handle, 0, 128)


def test_damage_at_any_byte_is_detected():
    """Flipping one bit anywhere in a span, or cutting it anywhere, is found, and the store stays as it was."""
    world = World([make_spec(q_heads=1, dim=1, v_dim=1)])
    handle, twin = world.open(3), world.open()
    span = world.store.export_span(handle, 0, 3)
    before = world.state()
    for place in range(len(span)):
        damaged = bytearray(span)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, bytes(damaged))
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, span[:place])
    with pytest.raises(IntegrityError):
        world.store.import_span(twin, span + b"\x00")
    assert world.state() == before
    assert world.store.import_span(twin, span) == 3


@pytest.mark.parametrize("change", ["model", "plan", "layers"])
def test_spans_of_another_model_or_plan_are_refused(change: str):
    """Weights, plan and layer shapes must be the ones the span was made with."""
    span_of = World([FULL], model_id=b"one")
    span = span_of.store.export_span(span_of.open(10), 0, 10)
    world = {
        "model": lambda: World([FULL], model_id=b"two"),
        "plan": lambda: World([FULL], model_id=b"one", plan="plain(fp32)"),
        "layers": lambda: World([make_spec(window=4096)], model_id=b"one"),
    }[change]()
    with pytest.raises(IntegrityError, match="another model or KV plan"):
        world.store.import_span(world.open(), span)
    same = World([FULL], model_id=b"one")
    assert same.store.import_span(same.open(), span) == 10


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b"[" * 100_000,
        b'{"start": 0, "stop": 3}',
        b'{"fingerprint": "FP", "start": 0, "stop": "3"}',
        b'{"fingerprint": "FP", "start": true, "stop": 3}',
        b'{"fingerprint": "FP", "start": 3, "stop": 0}',
        b'{"fingerprint": "FP", "start": -64, "stop": 3}',
        b'{"fingerprint": "FP", "start": 0, "stop": 1e400}',
        b'{"fingerprint": "FP", "start": 0, "stop": 300000000000000}',
        b'{"fingerprint": ["FP"], "start": 0, "stop": 3}',
        b'{"fingerprint": "FP", "start": 0, "stop": 300, "dropped": -1}',
        b'{"fingerprint": "FP", "start": 0, "stop": 300, "dropped": 5}',
        b'{"fingerprint": "FP", "start": 64, "stop": 300, "dropped": 1}',
        b'{"fingerprint": "FP", "start": 0, "stop": 300, "dropped": true}',
    ],
)
def test_garbage_headers_with_a_valid_checksum_are_refused(header: bytes):
    """Whatever the header says, the answer is an IntegrityError and an unchanged store."""
    world = World([FULL])
    twin = world.open()
    before = world.state()
    text = header.replace(b"FP", world.store.fingerprint.hex().encode())
    with pytest.raises(IntegrityError):
        world.store.import_span(twin, seal(text, bytes(4096)))
    assert world.state() == before


def test_header_length_beyond_the_span_and_foreign_files_are_refused():
    """A header that claims more bytes than there are, an empty file and another file type are refused."""
    world = World([FULL])
    twin = world.open()
    body = b"ELBKV\x00\x00\x03" + struct.pack("<I", 2**32 - 1) + b"{}"
    for span in (body + hashlib.blake2b(body, digest_size=32).digest(), b"", b"ELBKV", bytes(100)):
        with pytest.raises(IntegrityError):
            world.store.import_span(twin, span)


@BOTH
def test_span_with_too_few_strips_is_refused_before_anything_is_taken(kind: type[World]):
    """Header and payload must agree on the number of strips."""
    world = kind([FULL])
    twin = world.open()
    before = world.state()
    header = json.dumps(
        {"fingerprint": world.store.fingerprint.hex(), "start": 0, "stop": 65, "dropped": [], "open": []}
    ).encode()
    for size in (0, 4096, 8191, 8193):
        with pytest.raises(IntegrityError, match="bytes of strips"):
            world.store.import_span(twin, seal(header, bytes(size)))
    assert world.state() == before


@BOTH
def test_import_only_continues_a_sequence(kind: type[World]):
    """A span that starts elsewhere than where the sequence ends is refused."""
    world = kind([FULL])
    handle, other = world.open(128), world.open(64)
    tail = world.store.export_span(handle, 64, 128)
    assert world.store.import_span(other, tail) == 64
    for target in (world.open(), world.open(65), handle):
        with pytest.raises(IntegrityError, match="starts at token 64"):
            world.store.import_span(target, tail)


@BOTH
@pytest.mark.parametrize("bound", ["capacity", "ledger"])
def test_import_into_a_tight_budget_leaves_the_sequence_unchanged(kind: type[World], bound: str):
    """When one of two pools has no room, nothing is taken from either; after making room the import works."""
    layers = [FULL, make_spec(window=1000)]
    source = kind(layers)
    span = source.store.export_span(source.open(192), 0, 192)
    world = kind(layers, capacity=10 * 4096) if bound == "capacity" else kind(layers, limit=10 * 4096)
    filler, twin = world.open(128), world.open()
    world.open(64)
    before = world.state()
    with pytest.raises(OutOfBudget, match=r"a span of 192 tokens needs 24\.0 KiB of KV memory; 16\.0 KiB could"):
        world.store.import_span(twin, span)
    assert world.state() == before
    world.check()
    world.close(filler)
    assert world.store.import_span(twin, span) == 192
