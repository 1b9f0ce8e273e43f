"""A hash that runs beside its caller is the hash of the same chunks in the same order."""

import hashlib

import pytest

from offsite.storage.background_hash import BackgroundHash


@pytest.mark.parametrize("sizes", [(), (0, 3), (2**20,), (5, 2**20, 2**19, 1, 2**20)])
def test_the_hash_is_that_of_all_chunks_in_order(sizes: tuple[int, ...]) -> None:
    chunks = [bytes([place + 1]) * size for place, size in enumerate(sizes)]
    digest = hashlib.sha256()
    with BackgroundHash(digest.update) as hashing:
        for chunk in chunks:
            hashing.add(chunk)
    assert digest.hexdigest() == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_an_error_of_the_hash_reaches_the_caller() -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no hash")

    with pytest.raises(RuntimeError, match="no hash"), BackgroundHash(fail) as hashing:
        hashing.add(bytes(2**20))
