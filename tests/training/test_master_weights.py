import torch
from torch import nn

from offsite.training.master_weights import MasterWeights


def test_parameters_that_are_given_one_gradient_do_not_share_it() -> None:
    """As two biases that are only added: autograd hands both the same tensor."""
    for dtype in (torch.float32, torch.bfloat16):
        one, two = (nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2))
        weights = MasterWeights({"one": one, "two": two})
        for _ in range(2):
            (one + two).sum().backward()  # type: ignore[no-untyped-call]
            weights.collect_gradients()
        first, second = (master.grad for master in weights.masters.values())
        assert first is not None
        assert second is not None
        first.mul_(10)  # as clipping does
        assert first.tolist() == [20.0] * 3
        assert second.tolist() == [2.0] * 3
