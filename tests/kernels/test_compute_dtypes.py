"""What is said of the compute dtype before torch looks at the devices is what it then is."""

from typing import Any

import pytest

from offsite.kernels.compute_dtypes import ITEM_BYTES, possible_compute_dtypes
from offsite.kernels.runtime import resolve_runtime


@pytest.mark.parametrize("compute", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_dtype_is_one_of_those_that_were_said(compute: Any, device: str) -> None:
    possible = [ITEM_BYTES[one] for one in possible_compute_dtypes(compute, device)]
    assert resolve_runtime(device, compute, 1).dtype.itemsize in possible
    assert len(possible) == (2 if (compute, device) == ("auto", "auto") else 1)
