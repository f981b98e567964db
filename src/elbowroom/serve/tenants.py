"""Tenants: who asks, by API key or by a header that a trusted proxy sets."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from elbowroom.errors import RequestError
from elbowroom.serve.errors import Unauthorized

_NAME = re.compile(r"[A-Za-z0-9._@:+-]{1,64}")
_NAME_RULE = "1 to 64 of A-Z a-z 0-9 . _ @ : + -"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is; the empty name is everybody whom nothing tells apart."""

    name: str = ""
    weight: float = 1.0
    """Share of a tenant: of the queue, and under the order ``fair`` of what it is served."""


class Tenants:
    """Checks keys and names tenants.

    Keys are kept as hashes only, and each is compared in a time that does not depend on what was given.

    Args:
        api_key: one key without a tenant's name.
        key_file: lines ``KEY TENANT [WEIGHT]``; empty lines and those that begin with ``#`` are skipped.
        header: name of the header that names the tenant; who can reach the server can set it.

    Raises:
        RequestError: the file cannot be read or a line is malformed (keys are never shown), or both a file and a
            header would name tenants.
    """

    def __init__(self, api_key: str | None = None, key_file: Path | None = None, header: str | None = None) -> None:
        if key_file is not None and header is not None:
            raise RequestError("tenants are named by keys or by a header", "leave out api_key_file or tenant_header")
        if api_key is not None and not (api_key and api_key.isascii()):
            raise RequestError("the API key is empty or not ASCII", "set --api-key to a key, or leave it out")
        self._by_hash = {} if api_key is None else {_hash(api_key): Tenant()}
        self._header = header
        if key_file is not None:
            self._by_hash |= read_keys(key_file)

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed."""
        return bool(self._by_hash)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the tenants that keys name."""
        return {tenant.name: tenant.weight for tenant in self._by_hash.values()}

    def of(self, request: Request) -> Tenant:
        """Return whose request it is.

        Raises:
            Unauthorized: the server has keys and none of them was given.
            RequestError: the header's value is no name.
        """
        tenant = self._by_key(request) if self._by_hash else Tenant()
        given = None if self._header is None else request.headers.get(self._header)
        if given is None:
            return tenant
        if not _NAME.fullmatch(given):
            raise RequestError(f"{self._header} does not name a tenant", f"send {_NAME_RULE}")
        return Tenant(given)

    def _by_key(self, request: Request) -> Tenant:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _hash(key)
        found: Tenant | None = None
        for expected, tenant in self._by_hash.items():  # to the end, also when found
            if hmac.compare_digest(given, expected):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            raise Unauthorized("the API key is missing or wrong", "send Authorization: Bearer <your API key>")
        return found


def read_keys(path: Path) -> dict[bytes, Tenant]:
    """Return hash of the key -> tenant; errors as in ``Tenants``."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        kind = reason.strerror if isinstance(reason, OSError) else "it is not ASCII"
        raise RequestError(f"{path} cannot be read: {kind}", "write lines KEY TENANT [WEIGHT]") from None
    keys: dict[bytes, Tenant] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) not in (2, 3) or not _NAME.fullmatch(fields[1]):
            raise RequestError(f"{path}, line {number} is not KEY TENANT [WEIGHT]", f"a tenant is {_NAME_RULE}")
        if _hash(fields[0]) in keys:
            raise RequestError(f"{path}, line {number} repeats a key", "give each tenant keys of its own")
        keys[_hash(fields[0])] = Tenant(fields[1], _weight(path, number, fields[2:]))
    if not keys:
        raise RequestError(f"{path} holds no key", "write lines KEY TENANT [WEIGHT]")
    return keys


def _weight(path: Path, number: int, fields: list[str]) -> float:
    try:
        weight = float(fields[0]) if fields else 1.0
    except ValueError:
        weight = 0.0
    if not 0.0 < weight <= 1000.0:
        raise RequestError(f"{path}, line {number} has no weight above 0 and up to 1000", "leave it out for 1")
    return weight


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
