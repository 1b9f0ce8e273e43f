"""Arrays on their way to a device."""

import numpy as np
import torch

from offsite.models import to_device as module
from offsite.models.to_device import to_device


def test_on_the_cpu_nothing_is_copied():
    array = np.arange(3)
    assert to_device(array, torch.device("cpu")).data_ptr() == array.ctypes.data


def test_a_copy_to_a_cuda_device_does_not_wait_for_what_is_queued_there(monkeypatch):
    """From ordinary memory it would, and with `non_blocking` alone too."""
    calls = []

    class Tensor:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, *given, **named):
            calls.append((given, named))
            return self

    class Torch:
        from_numpy = staticmethod(lambda array: Tensor())

    monkeypatch.setattr(module, "torch", Torch)
    to_device(np.zeros(2), torch.device("cuda"))
    assert calls == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})]
