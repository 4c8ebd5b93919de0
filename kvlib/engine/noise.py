"""The key of a sample's noise; the noise itself is kvlib.kernels.noise."""

import hashlib


def key(*parts: object) -> int:
    """A 32-bit key from anything printable, e.g. key(seed, problem_id, sample)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
