"""Splits a causal language model into backbone (tokens to hidden states) and head (hidden states to logits)."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.errors import IncompatibleError
from offsite.models.families.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "logit_softcapping")  # config keys of caps, by their names


@dataclass(frozen=True)
class Network:
    """A causal language model in two parts: `body` computes hidden states from tokens, `head` logits from these."""

    body: nn.Module
    head: nn.Linear
    cap: float | None = None  # logits are cap * tanh(logits / cap)
    scale: float = 1.0  # by which logits are multiplied, before the cap
    before_pass: list[Callable[[Any], None]] = field(default_factory=list, compare=False)  # called with each batch

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from hidden states (..., H)."""
        return capped(F.linear(hidden, self.head.weight, self.head.bias) * self.scale, self.cap)


class UpToHead(nn.Module):
    """A causal language model up to the input of its head, for models with more layers between blocks and head.

    It may run in several threads at once.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._running = threading.local()
        head.register_forward_pre_hook(self._leave)

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Run the model; the result has the head's input, (B, T, H), as `last_hidden_state`."""
        self._running.now = True
        try:
            self.model(**inputs)
        except _ReachedHead as reached:
            return SimpleNamespace(last_hidden_state=reached.hidden)
        finally:
            self._running.now = False
        raise IncompatibleError(
            f"{type(self.model).__name__} does not call its head",
            next_step="choose a model of another type; docs/models.md lists those that are tested",
        )

    def _leave(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of the head: end the model's forward pass by an exception with the head's input."""
        if getattr(self._running, "now", False):
            raise _ReachedHead(arguments[0])


class _ReachedHead(Exception):  # noqa: N818  a signal, caught where it is raised for
    """Raised at the head to end a forward pass; `hidden` is the head's input, (B, T, H)."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def split_backbone_and_head(model: "PreTrainedModel") -> Network:
    """Split a model in eval mode into body and head, after a check on a few tokens that they give the model's logits.

    The check tries the model's body, then all of the model up to the head. For each it tries the logit caps that the
    family or the config names, and a scale of the logits.

    Raises:
        IncompatibleError: no combination gives the model's logits.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(8, device=head.weight.device).remainder(head.weight.shape[0])[None]

    def bodies() -> Iterator[tuple[nn.Module, torch.Tensor]]:
        for body in (model.base_model, UpToHead(model, head)):
            if body is not model:
                yield body, hidden_states(body, ids, torch.ones_like(ids))

    with torch.no_grad():
        return _matching(model, bodies(), _logits(model, ids))[0]


@dataclass(frozen=True)
class OnePass:
    """What was seen in one forward pass of a whole model over tokens: its logits, and what may be its body's output."""

    logits: torch.Tensor  # (1, T, V), in float32
    bodies: Sequence[tuple[nn.Module, torch.Tensor]]  # a candidate for the body, and its hidden states (1, T, H)

    def split(self, model: "PreTrainedModel") -> tuple[Network, torch.Tensor]:
        """Split the model as `split_backbone_and_head` does, without another pass; for a model of a proved family.

        Returns:
            Body and head, and the body's hidden states for the tokens, (1, T, H).

        Raises:
            IncompatibleError: as for `split_backbone_and_head`.
        """
        return _matching(model, self.bodies, self.logits)


@torch.no_grad()
def run_once(model: "PreTrainedModel", ids: torch.Tensor) -> OnePass:
    """Run a whole model once on token ids (1, T) without padding, and record what `OnePass` has."""
    head, body = model.get_output_embeddings(), model.base_model
    seen: dict[str, torch.Tensor] = {}
    hooks = [head.register_forward_pre_hook(lambda _, arguments: seen.update(head=arguments[0]))]
    if body is not model:
        hooks.append(body.register_forward_hook(lambda *call: seen.update(body=call[-1].last_hidden_state)))
    try:
        logits = _logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    bodies = {"body": body, "head": UpToHead(model, head)}
    return OnePass(logits, [(bodies[name], seen[name]) for name in bodies if name in seen])


def _logits(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    """The model's own logits (B, T, V) in float32 for token ids (B, T), without padding."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()


def _matching(
    model: "PreTrainedModel", bodies: Iterable[tuple[nn.Module, torch.Tensor]], whole: torch.Tensor
) -> tuple[Network, torch.Tensor]:
    """The first body whose hidden states give the model's logits, with the head, and these hidden states.

    Args:
        model: the whole model.
        bodies: candidates for the body, each with its hidden states for some tokens, (1, T, H).
        whole: the model's logits for these tokens, (1, T, V).

    Raises:
        IncompatibleError: no combination of body, cap and scale gives the logits.
    """
    head, apart = model.get_output_embeddings(), float("inf")
    for body, hidden in bodies:
        if hidden.shape[-1] != head.weight.shape[1]:
            continue
        with torch.no_grad():
            for network in _networks(model, body, head, hidden, whole):
                apart = min(apart, _distance(network.logits(hidden).float(), whole, head.weight.dtype))
                if not apart:
                    return network, hidden
    raise IncompatibleError(
        f"models of type {model.config.model_type!r} do more to their logits than a linear head",
        reasons=[f"logits differ by up to {apart:.3g}"],
        next_step="use a model of another type; docs/models.md lists those that work",
    )


def _networks(
    model: "PreTrainedModel", body: nn.Module, head: nn.Linear, hidden: torch.Tensor, whole: torch.Tensor
) -> Iterator[Network]:
    """Yield the candidates that the check of `split_backbone_and_head` tries for one body.

    They have the family's logit cap; or, for a model that is not in the table, each cap in the config, no cap, and a
    fitted scale.

    Args:
        model: the whole model.
        body: the part that computes hidden states.
        head: the output head.
        hidden: the body's output for some tokens, (1, T, H).
        whole: the model's logits for the same tokens, (1, T, V).
    """
    family = ARCHITECTURES.get(model.config.model_type)
    if family is not None:
        yield Network(body, head, getattr(model.config, family.logit_cap) if family.logit_cap else None)
        return
    found = [getattr(model.config, key, None) for key in _CAPS]
    caps = [float(cap) for cap in found if isinstance(cap, int | float) and cap > 0]
    for cap in (*caps, None):
        yield Network(body, head, cap)
    plain = F.linear(hidden, head.weight, head.bias).float()
    yield Network(body, head, None, float((whole * plain).sum() / plain.square().sum()))


def _distance(found: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest absolute difference between two tensors of logits; 0 if it is within the rounding of `dtype`."""
    step = torch.finfo(dtype).eps
    alike = torch.allclose(whole, found, rtol=2 * step, atol=4 * step * float(whole.abs().max()))
    return 0.0 if alike else float((whole - found).abs().max())


def hidden_states(body: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run the backbone on ids and mask, both (B, T); return the hidden states before the head, (B, T, H)."""
    hidden: torch.Tensor = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(logits / cap) for logits of any shape (Gemma 2, arXiv 2408.00118, section 2); None: no change."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
