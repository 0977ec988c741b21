"""Ed25519 (RFC 8032, section 5.1) in whole numbers: slow, and independent of the library that production uses."""

from hashlib import sha512

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]
IDENTITY: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def multiply(point: Point, times: int) -> Point:
    total = IDENTITY
    while times:
        if times & 1:
            total = add(total, point)
        point, times = add(point, point), times >> 1
    return total


def find_x(y: int, sign: int) -> int | None:
    """The x of the point with this y, None where there is none."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return P - x if x % 2 != sign and x else x


def encode(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def base() -> Point:
    y = 4 * pow(5, -1, P) % P
    x = find_x(y, 0)
    assert x is not None
    return x, y


def _halves(seed: bytes) -> tuple[int, bytes]:
    digest = sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | (1 << 254)
    return scalar, digest[32:]


def public_key(seed: bytes) -> bytes:
    return encode(multiply(base(), _halves(seed)[0]))


def sign(seed: bytes, message: bytes) -> bytes:
    scalar, prefix = _halves(seed)
    nonce = int.from_bytes(sha512(prefix + message).digest(), "little") % L
    commitment = encode(multiply(base(), nonce))
    challenge = int.from_bytes(sha512(commitment + public_key(seed) + message).digest(), "little") % L
    return commitment + ((nonce + challenge * scalar) % L).to_bytes(32, "little")


def low_order() -> set[Point]:
    """All points whose order divides 8."""
    y = 2
    while (x := find_x(y, 0)) is None or len(points := _multiples(multiply((x, y), L))) < 8:
        y += 1
    return points


def _multiples(point: Point) -> set[Point]:
    return {multiply(point, times) for times in range(8)}
