"""The public functions that make a model fast on a device; code outside `kernels/` imports only from here.

Names are imported when they are first used, so that a caller who needs no torch does not load it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offsite.kernels.activation_checkpointing import checkpoint_activations as checkpoint_activations
    from offsite.kernels.activation_checkpointing import keep_activations as keep_activations
    from offsite.kernels.fused_loss import labelled_cross_entropy as labelled_cross_entropy
    from offsite.kernels.micro_batches import ForwardRunner as ForwardRunner
    from offsite.kernels.micro_batches import MicroBatchRunner as MicroBatchRunner
    from offsite.kernels.micro_batches import count_side_by_side as count_side_by_side
    from offsite.kernels.micro_batches import forward_runner as forward_runner
    from offsite.kernels.micro_batches import micro_batch_runner as micro_batch_runner
    from offsite.kernels.prepare_on_backend import backend_of as backend_of
    from offsite.kernels.prepare_on_backend import prepare as prepare
    from offsite.kernels.prepare_on_backend import prepare_adapters as prepare_adapters
    from offsite.kernels.prepare_on_backend import prepare_sharded as prepare_sharded
    from offsite.kernels.replacement_report import Piece as Piece
    from offsite.kernels.replacement_report import Report as Report

_NAMES = {
    "activation_checkpointing": ("checkpoint_activations", "keep_activations"),
    "fused_loss": ("labelled_cross_entropy",),
    "micro_batches": (
        "ForwardRunner",
        "MicroBatchRunner",
        "count_side_by_side",
        "forward_runner",
        "micro_batch_runner",
    ),
    "prepare_on_backend": ("backend_of", "prepare", "prepare_adapters", "prepare_sharded"),
    "replacement_report": ("Piece", "Report"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up finds it without this function
    return value


def __dir__() -> list[str]:
    """The public names, for completion in an interactive shell."""
    return sorted(_MODULE_OF)
