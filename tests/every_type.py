"""What happens to a tiny model of a causal model type: packed, tuned and plugged in, or refused, and why."""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

import offsite
from offsite import Base, EvalSpec, PackSpec, PlugInSpec, TuneSpec
from offsite.config import Method
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.models.families.derive_family import derive_family
from offsite.models.families.transformers_types import config_keys
from tiny import Parties, tiny_parties, tiny_rows
from tiny_types import tiny_type_base

EXACT = EvalSpec(compute="fp32", device="cpu", threads=1)


@dataclass(frozen=True)
class Outcome:
    """What happened to a model type: by a row of the table, read off the model, refused, or not made at all."""

    model_type: str
    status: Literal["row", "derived", "refused", "not made"]
    methods: tuple[str, ...] = ()  # that its bundle permits
    lora: tuple[str, ...] = ()  # the layers of a block that LoRA adapts, of all kinds of blocks
    kinds: int = 0  # of blocks
    why: str = ""  # it was refused, or could not be made

    def record(self) -> dict[str, Any]:
        """The outcome as JSON has it, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value}


def try_type(model_type: str, folder: Path, methods: tuple[Method, ...] = ("lora", "full")) -> Outcome:
    """Make a tiny model of a type, pack it whole, tune it by each method, plug it in, and compare every view.

    Raises:
        AssertionError: two views of the tuned model differ.
        OffsiteError: something else than packing was refused.
    """
    if "text_config" in config_keys(model_type):
        try:
            derive_family({"model_type": model_type})
        except IncompatibleError as error:
            return Outcome(model_type, "refused", why=_short("; ".join(error.reasons)))
    try:
        base = tiny_type_base(folder / "base", model_type)
    except Exception as error:  # noqa: BLE001  what a library raises on a config has no end
        return Outcome(model_type, "not made", why=_short(f"{type(error).__name__}: {error}"))
    parties = tiny_parties(folder)
    try:
        blocks = open_base(Base(base)).blocks
        spec = PackSpec(bottom=1, top=1, keep=blocks - 2, dtype="fp32", max_rank=4)
        bundle = offsite.pack(Base(base), folder / "bundle", "hospital", spec, parties.owner)
    except IncompatibleError as error:
        return Outcome(model_type, "refused", why=_short("; ".join(error.reasons) or error.what))
    assert offsite.verify_bundle(folder / "bundle", parties.data_owner) == bundle
    assert _logits(base).sub(_logits(bundle.folder)).abs().max() < 1e-4
    for method in methods:
        if method in bundle.manifest.methods:
            _tune_and_plug_in(Base(base), bundle, method, folder, parties)
    family = bundle.manifest.family
    return Outcome(
        model_type,
        "row" if bundle.manifest.declared_family is None else "derived",
        tuple(bundle.manifest.methods),
        tuple(dict.fromkeys(path for one in family.layouts for path in one.linears)) or family.lora_linears,
        len(family.layouts) or 1,
    )


def _tune_and_plug_in(base: Base, bundle: offsite.Bundle, method: Method, folder: Path, parties: Parties) -> None:
    """Tune, plug in, and compare the data owner's view with adapter and merged model."""
    rows = tiny_rows(folder / "rows.jsonl", 8)
    settings = {"lr": 3e-3, "max_steps": 3, "batch_size": 4, "compute": "fp32", "device": "cpu", "threads": 1}
    spec = TuneSpec.model_validate({"method": method, "rank": 4, "max_length": 64, **settings})
    returned = offsite.tune(bundle, rows, folder / f"return-{method}", spec, parties.data_owner)
    own = offsite.evaluate(bundle.folder, rows, EXACT, adapter=returned.folder).loss
    assert abs(own - offsite.evaluate(base.folder, rows, EXACT).loss) > 1e-6, "nothing was learned"
    taken = offsite.intake(returned.folder, parties.owner)
    for form in ("merged", "adapter") if method == "lora" else ("merged",):
        plugged_in = PlugInSpec.model_validate({"as": form, "again": True})
        made = offsite.plug_in(base, taken, folder / f"{form}-{method}", plugged_in, parties.owner)
        model, adapter = (base.folder, made.folder) if form == "adapter" else (made.folder, None)
        plugged = offsite.evaluate(model, rows, EXACT, adapter=adapter).loss
        assert abs(plugged - own) < 1e-4, (method, form, plugged, own)
        shutil.rmtree(made.folder)


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    """Logits by transformers alone, of a folder that it loads without a tensor missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([[1, 5, 9, 40, 77, 3, 200]])
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def _short(text: str) -> str:
    """A reason in one line, without what differs from machine to machine."""
    plain = re.sub(r"/\S+", "FOLDER", re.sub(r"\s+", " ", text)).strip()
    return plain if len(plain) <= 200 else f"{plain[:200]}..."
