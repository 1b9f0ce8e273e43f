"""Dropout by a generator of the thread's own."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.cpu.thread_dropout import OwnRandomness, drawn_seed, own_randomness


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_drops_the_share_that_was_asked_for_and_the_same_backwards(dtype):
    given = torch.randn(101, 331, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad_output = torch.randn(101, 331, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with OwnRandomness(7):
        found = nn.Dropout(0.25)(given)
    (gradient,) = torch.autograd.grad(found, given, grad_output)
    lives = found != 0
    assert abs(float(lives.float().mean()) - 0.75) < 0.01
    assert torch.equal(found, torch.where(lives, given * (1 / 0.75), 0))
    assert torch.equal(gradient, torch.where(lives, grad_output * (1 / 0.75), 0))


def test_what_is_laid_out_otherwise_is_dropped_alike():
    given = torch.randn(64, 32)
    with OwnRandomness(7):
        found = F.dropout(given.t(), 0.5)
    assert torch.equal(found, torch.where(found != 0, given.t() * 2, 0))
    assert 0.45 < float((found != 0).float().mean()) < 0.55


def test_a_seed_settles_it_and_torchs_own_generator_is_left_alone():
    given, before = torch.ones(1000), torch.get_rng_state()

    def drawn(seed):
        with OwnRandomness(seed) as own:
            first = F.dropout(given, 0.5), drawn_seed()
            state = own.state
            later = F.dropout(given, 0.5), drawn_seed()
        return (*first, *later), state

    one, state = drawn(3)
    same, _ = drawn(3)
    other, _ = drawn(4)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[2])
    assert len({one[1], one[3], other[1]}) == 3
    with OwnRandomness(state):
        assert torch.equal(F.dropout(given, 0.5), one[2])
    assert torch.equal(before, torch.get_rng_state())


def test_threads_and_levels_are_apart():
    apart = []
    with OwnRandomness(1) as outer:
        other = threading.Thread(target=lambda: apart.append(own_randomness()))
        other.start()
        other.join()
        with OwnRandomness(2) as inner:
            assert own_randomness() is inner
        assert own_randomness() is outer
    assert apart == [None]
    assert own_randomness() is None
    torch.manual_seed(0)
    expected = torch.randint(2**62, ())
    torch.manual_seed(0)
    assert drawn_seed() == int(expected)


def test_what_it_does_not_know_is_torchs():
    given = torch.ones(1000, dtype=torch.float64)
    with OwnRandomness(0):
        assert F.dropout(given, 0.5, training=False) is given
        assert torch.equal(F.dropout(torch.ones(9), 1.0), torch.zeros(9))
        assert set(F.dropout(given, 0.5).tolist()) == {0.0, 2.0}
        inside = torch.ones(1000)
        F.dropout(inside, 0.5, inplace=True)
        assert set(inside.tolist()) == {0.0, 2.0}
