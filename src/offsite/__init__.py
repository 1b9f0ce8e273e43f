"""Offsite-tuning between two parties: tune a model on private data, while neither party sends its model or its data.

The stages of both parties are functions of this package; each takes an artifact and makes the next one:

    import_model -> pack      the model owner: base checkpoint -> signed bundle
    verify_bundle -> tune     the data owner: bundle -> signed return
    intake -> plug_in         the model owner: return -> base with the adapter
    evaluate                  either party: the loss of a model on a data set

Public names are imported when they are first used, so importing `offsite` imports neither torch nor transformers.
Paper: Offsite-Tuning: Transfer Learning without Full Model, arXiv 2302.04870.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offsite.config import EvalSpec, ImportSpec, PackSpec, PlugInSpec, TuneSpec, load_spec
    from offsite.data_owner.tune import tune
    from offsite.errors import (
        DataError,
        IncompatibleError,
        OffsiteError,
        PolicyError,
        StorageError,
        UsageError,
        VerificationError,
    )
    from offsite.evaluation.compare import Comparison, Contestant, compare
    from offsite.evaluation.evaluate import Score, evaluate
    from offsite.evaluation.lm_eval_harness import TaskScore, run_tasks
    from offsite.model_owner.importing.import_model import import_model
    from offsite.model_owner.intake import intake
    from offsite.model_owner.pack import pack
    from offsite.model_owner.plugging_in.choose_plug_in import Choice, choose
    from offsite.model_owner.plugging_in.plug_in import plug_in
    from offsite.progress import Event, Progress
    from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return
    from offsite.protocol.home import Home
    from offsite.protocol.signing import Identity, PublicKey
    from offsite.protocol.verify import verify, verify_bundle, verify_plug_in, verify_return

    __version__: str

__all__ = [
    "Base",
    "Bundle",
    "Choice",
    "Comparison",
    "Contestant",
    "DataError",
    "EvalSpec",
    "Event",
    "Home",
    "Identity",
    "ImportSpec",
    "IncompatibleError",
    "OffsiteError",
    "PackSpec",
    "PlugIn",
    "PlugInSpec",
    "PolicyError",
    "Progress",
    "PublicKey",
    "Return",
    "Score",
    "StorageError",
    "TaskScore",
    "TuneSpec",
    "UsageError",
    "VerificationError",
    "__version__",
    "choose",
    "compare",
    "evaluate",
    "import_model",
    "intake",
    "load_spec",
    "pack",
    "plug_in",
    "run_tasks",
    "tune",
    "verify",
    "verify_bundle",
    "verify_plug_in",
    "verify_return",
]

# The module of each public name; a test compares this with __all__ and with the imports above.
_WHERE = {
    "offsite.config": ("EvalSpec", "ImportSpec", "PackSpec", "PlugInSpec", "TuneSpec", "load_spec"),
    "offsite.progress": ("Event", "Progress"),
    "offsite.data_owner.tune": ("tune",),
    "offsite.errors": (
        "DataError",
        "IncompatibleError",
        "OffsiteError",
        "PolicyError",
        "StorageError",
        "UsageError",
        "VerificationError",
    ),
    "offsite.protocol.artifacts": ("Base", "Bundle", "PlugIn", "Return"),
    "offsite.protocol.home": ("Home",),
    "offsite.protocol.signing": ("Identity", "PublicKey"),
    "offsite.protocol.verify": ("verify", "verify_bundle", "verify_plug_in", "verify_return"),
    "offsite.evaluation.compare": ("Comparison", "Contestant", "compare"),
    "offsite.evaluation.evaluate": ("Score", "evaluate"),
    "offsite.evaluation.lm_eval_harness": ("TaskScore", "run_tasks"),
    "offsite.model_owner.plugging_in.choose_plug_in": ("Choice", "choose"),
    "offsite.model_owner.importing.import_model": ("import_model",),
    "offsite.model_owner.intake": ("intake",),
    "offsite.model_owner.pack": ("pack",),
    "offsite.model_owner.plugging_in.plug_in": ("plug_in",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("offsite-tuning")
        except PackageNotFoundError:  # run from the source tree, not installed
            return "0+unknown"
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    if not isinstance(value, type):
        value = _accept_text_paths(value)
    globals()[name] = value  # so that Python finds the name itself the next time
    return value


def _accept_text_paths(stage: Any) -> Any:
    """Wrap a stage function so that it also accepts a string for each parameter whose type is `Path`."""
    import functools
    import inspect
    import typing
    from pathlib import Path

    signature = inspect.signature(stage)
    paths = {
        name for name, one in signature.parameters.items() if Path in (one.annotation, *typing.get_args(one.annotation))
    }

    @functools.wraps(stage)
    def called(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **named)
        for name in paths & bound.arguments.keys():
            if isinstance(bound.arguments[name], str):
                bound.arguments[name] = Path(bound.arguments[name])
        return stage(*bound.args, **bound.kwargs)

    return called


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
