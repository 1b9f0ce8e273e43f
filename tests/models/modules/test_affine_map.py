"""The map behind a block: what it computes, and that it leaves alone what else a block gives."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from offsite.models.modules.affine_map import Affine, stand_behind
from offsite.models.modules.declared import Declared


class Block(nn.Module):
    def __init__(self, *beside: Any) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, hidden: torch.Tensor) -> Any:
        return (2 * hidden, *self.beside) if self.beside else 2 * hidden


@pytest.mark.parametrize("beside", [(), (None, "cache")])
def test_what_leaves_the_block_is_mapped(beside: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 5), torch.randn(5, 5), torch.randn(5)
    block = Block(*beside)
    stand_behind(block, Affine(weight, bias))
    found = block(hidden)
    if beside:
        found, *rest = found
        assert rest == list(beside)
    torch.testing.assert_close(found, 2 * hidden + 2 * hidden @ weight + bias)
    assert {name: value.requires_grad for name, value in block.named_parameters()} == {
        "affine.weight": False,
        "affine.bias": False,
    }


def test_the_gradient_goes_through_it() -> None:
    hidden = torch.randn(4, 5, requires_grad=True)
    weight = torch.randn(5, 5)
    above = torch.randn(4, 5)
    Affine(weight, torch.randn(5))(hidden).backward(above)
    torch.testing.assert_close(hidden.grad, above + above @ weight.T)


@pytest.mark.parametrize("settings", [{"affine": True, "share": [0, 0]}, {"affine": False}, {"affine": 1}])
def test_what_may_not_be_declared(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Declared.model_validate({"first": 1, "blocks": 2, **settings})
