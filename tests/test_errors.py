import pytest

from offsite import errors
from offsite.errors import OffsiteError

CODES = {
    "OffsiteError": 1,
    "StorageError": 1,
    "UsageError": 2,
    "DataError": 2,
    "VerificationError": 3,
    "IncompatibleError": 4,
    "PolicyError": 5,
}


@pytest.mark.parametrize("name", CODES)
def test_exit_codes(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, OffsiteError)
    assert kind.exit_code == CODES[name]


def test_every_error_is_listed_here() -> None:
    kinds = {n for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, Exception)}
    assert kinds == set(CODES)


def test_what_it_says() -> None:
    error = OffsiteError("it broke", reasons=["a", "b"], next_step="mend it")
    assert str(error) == "it broke\n  - a\n  - b\nNext: mend it"
    assert error.args == ("it broke",)
    assert str(OffsiteError("it broke")) == "it broke"
    assert OffsiteError("x", reasons=[]).reasons == ()
