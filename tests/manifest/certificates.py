"""Certificates made on the spot for tests of https: one self-signed certificate on the curve P-256.

Standard library alone, so that no key lies in the repository. The formulas are those of SEC 1 and FIPS 186-4;
never to be used outside of tests (nothing here runs in constant time).
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from pathlib import Path

P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None

EC_KEY, P_256 = "2a8648ce3d0201", "2a8648ce3d030107"
ECDSA_SHA256, COMMON_NAME = "2a8648ce3d040302", "550403"
SUBJECT_KEY, KEY_USAGE, OTHER_NAMES, CONSTRAINTS = "551d0e", "551d0f", "551d11", "551d13"


def add(first: Point, second: Point) -> Point:
    """Sum of two points of the curve; None is the neutral one."""
    if first is None or second is None:
        return first or second
    if first[0] == second[0]:
        if (first[1] + second[1]) % P == 0:
            return None
        slope = 3 * (first[0] ** 2 - 1) * pow(2 * first[1], -1, P)
    else:
        slope = (second[1] - first[1]) * pow(second[0] - first[0], -1, P)
    x = (slope**2 - first[0] - second[0]) % P
    return x, (slope * (first[0] - x) - first[1]) % P


def times(number: int, point: Point) -> Point:
    """Multiple of a point."""
    total: Point = None
    while number:
        if number & 1:
            total = add(total, point)
        point, number = add(point, point), number >> 1
    return total


def der(tag: int, *parts: bytes) -> bytes:
    """One DER value."""
    body = b"".join(parts)
    size = len(body)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + body


def integer(number: int) -> bytes:
    return der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def oid(code: str) -> bytes:
    return der(6, bytes.fromhex(code))


def extension(code: str, value: bytes, critical: bool = False) -> bytes:
    return der(0x30, oid(code), der(1, b"\xff") if critical else b"", der(4, value))


def pem(kind: str, data: bytes) -> str:
    return f"-----BEGIN {kind}-----\n{base64.encodebytes(data).decode('ascii')}-----END {kind}-----\n"


def self_signed(folder: Path, *hosts: str) -> tuple[Path, Path]:
    """Certificate and key (PEM files) of a server that has these names, valid for an hour."""
    secret = secrets.randbelow(N - 1) + 1
    public = times(secret, G)
    assert public is not None
    point = b"\x04" + public[0].to_bytes(32, "big") + public[1].to_bytes(32, "big")
    algorithm = der(0x30, oid(ECDSA_SHA256))
    name = der(0x30, der(0x31, der(0x30, oid(COMMON_NAME), der(0x0C, b"language-bridge tests"))))
    validity = (
        der(0x18, time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + shift)).encode("ascii"))
        for shift in (-3600, 3600)
    )
    names = der(0x30, *(der(0x82, host.encode("ascii")) for host in hosts))
    told = der(
        0x30,
        der(0xA0, integer(2)),
        integer(secrets.randbits(64)),
        algorithm,
        name,
        der(0x30, *validity),
        name,
        der(0x30, der(0x30, oid(EC_KEY), oid(P_256)), der(3, b"\0", point)),
        der(
            0xA3,
            der(
                0x30,
                extension(CONSTRAINTS, der(0x30, der(1, b"\xff")), critical=True),
                extension(KEY_USAGE, der(3, b"\x02\x84"), critical=True),
                extension(SUBJECT_KEY, der(4, hashlib.sha1(point).digest())),
                extension(OTHER_NAMES, names),
            ),
        ),
    )
    digest = int.from_bytes(hashlib.sha256(told).digest(), "big")
    nonce = secrets.randbelow(N - 1) + 1
    shared = times(nonce, G)
    assert shared is not None
    r = shared[0] % N
    s = pow(nonce, -1, N) * (digest + r * secret) % N
    certificate = der(0x30, told, algorithm, der(3, b"\0", der(0x30, integer(r), integer(s))))
    key = der(
        0x30,
        integer(1),
        der(4, secret.to_bytes(32, "big")),
        der(0xA0, oid(P_256)),
        der(0xA1, der(3, b"\0", point)),
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_text(pem("CERTIFICATE", certificate), encoding="ascii")
    paths[1].write_text(pem("EC PRIVATE KEY", key), encoding="ascii")
    return paths
