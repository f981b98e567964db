"""The byte format of an exported span of tokens: the one way for swap, tiers, restart and disaggregation.

``magic | u32 header length | header JSON | noted by a policy | strips, layer by layer | 32-byte BLAKE2b of all``
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elbowroom.core import STRIP_TOKENS
from elbowroom.errors import IntegrityError
from elbowroom.kv.holding import NEVER, Extent

_MAGIC = b"ELBKV\x00\x00\x03"
_DIGEST_BYTES = 32


def pack_span(
    fingerprint: bytes, start: int, extent: Extent, strips: Sequence[npt.NDArray[np.uint8]], noted: bytes = b""
) -> bytes:
    """Return the object for the tokens from ``start`` on.

    Args:
        fingerprint: names model and plan.
        start: first token.
        extent: how the sequence is held.
        strips: bytes of its tokens, layer by layer.
        noted: what a policy knows of the tokens.
    """
    fields = {"fingerprint": fingerprint.hex(), "start": start, "stop": extent.num_tokens}
    fields |= {"dropped": list(extent.dropped), "open": list(extent.open_from)}
    if noted:
        fields["noted_bytes"] = len(noted)
    header = json.dumps(fields).encode()
    views: list[memoryview] = [strip.data for strip in strips]  # no copy before the one that joins them
    parts: list[bytes | memoryview] = [_MAGIC, struct.pack("<I", len(header)), header, noted, *views]
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return b"".join((*parts, digest.digest()))


def unpack_span(span: bytes, fingerprint: bytes, num_layers: int) -> tuple[int, Extent, bytes, memoryview]:
    """Return start, extent, what was noted and the strips of a span.

    Raises:
        IntegrityError: truncated, damaged, or of another model, plan or version.
    """
    view = memoryview(span)
    if len(span) < len(_MAGIC) + 4 + _DIGEST_BYTES or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise IntegrityError("not an exported KV span, or one of another version")
    body = view[:-_DIGEST_BYTES]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != bytes(view[-_DIGEST_BYTES:]):
        raise IntegrityError("the KV span fails its checksum", "prefill those tokens again")
    (length,) = struct.unpack_from("<I", body, len(_MAGIC))
    begin = len(_MAGIC) + 4
    made_with, start, extent, noted_bytes = _read_header(bytes(body[begin : begin + length]), num_layers)
    if made_with != fingerprint.hex():
        raise IntegrityError("the KV span is of another model or KV plan", "use the model and kv= it was made with")
    rest = body[begin + length :]
    return start, extent, bytes(rest[:noted_bytes]), rest[noted_bytes:]


def _read_header(header: bytes, num_layers: int) -> tuple[str, int, Extent, int]:
    """Return fingerprint, start, extent and the bytes of what was noted."""
    try:
        fields = json.loads(header)
        made_with, start, stop = (fields[name] for name in ("fingerprint", "start", "stop"))
        exceptions = [fields[name] for name in ("dropped", "open")]
        noted_bytes = fields.get("noted_bytes", 0)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError("the KV span has no readable header") from error
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop:
        raise IntegrityError(f"the KV span names the tokens {start!r}..{stop!r}")
    for blocks in exceptions:
        counts = blocks if isinstance(blocks, list) and len(blocks) in (0, num_layers) else [None]
        if (blocks and start) or not all(type(count) is int and 0 <= count <= NEVER for count in counts):
            raise IntegrityError(f"the KV span names {blocks!r} as dropped or open blocks")
    dropped, open_from = exceptions
    if any(count * STRIP_TOKENS > stop for count in dropped):
        raise IntegrityError(f"the KV span names {dropped!r} dropped blocks of {stop} tokens")
    if type(noted_bytes) is not int or noted_bytes < 0:
        raise IntegrityError(f"the KV span names {noted_bytes!r} bytes of what was noted")
    return str(made_with), start, Extent(stop, tuple(dropped), tuple(open_from)), noted_bytes
