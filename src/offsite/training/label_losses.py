"""The loss of a batch of text on its labelled tokens."""

import torch

from offsite.data.batches import Batch
from offsite.kernels import labelled_cross_entropy
from offsite.models.backbone import Network, hidden_states
from offsite.models.to_device import to_device


def label_losses(network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch through the network and compute the loss of its labelled tokens.

    Returns:
        The loss in nats, summed over the L labelled tokens, a scalar with a gradient; and the loss of each labelled
        token in nats, (L,), fp32, without gradient.
    """
    device = network.head.weight.device
    for prepare in network.before_pass:
        prepare(batch)
    ids, mask = to_device(batch.ids, device), to_device(batch.mask, device)  # (B, T)
    hidden = hidden_states(network.body, ids, mask)  # (B, T, H)
    picked = hidden.flatten(0, 1).index_select(0, to_device(batch.places, device))  # (L, H)
    targets = to_device(batch.targets, device)
    bias: torch.Tensor | None = network.head.bias
    if network.scale != 1:
        picked, bias = picked * network.scale, None if bias is None else bias * network.scale
    return labelled_cross_entropy(picked, network.head.weight, targets, bias, network.cap)
