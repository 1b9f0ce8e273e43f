"""What `offsite eval` verifies before it scores, and which adapters it takes for which model."""

import json
from pathlib import Path

import pytest

from artifacts import copied_folder, lora_return, packed
from offsite.cli import main
from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError, VerificationError
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.manifest import MANIFEST
from tiny import MakeBase, Parties, tiny_rows


class Chain:
    """A base, two bundles of it, a return for the first, and its plug-in in both forms."""

    def __init__(self, folder: Path, base: Path, parties: Parties) -> None:
        self.base, self.home, self.rows = base, parties.owner, tiny_rows(folder / "rows.jsonl", 3)
        self.bundle = packed(base, folder / "bundle", parties)
        self.other = packed(base, folder / "other", parties, keep=2)
        self.returned = lora_return(self.bundle, folder / "return", parties.data_owner)
        for form in ("adapter", "merged"):
            spec = PlugInSpec.model_validate({"as": form, "again": True})
            plug_in(Base(base), intake(self.returned.folder, parties.owner), folder / form, spec, parties.owner)
        self.adapter, self.merged = folder / "adapter", folder / "merged"

    def eval(self, model: Path, adapter: Path | None = None, *more: str) -> int:
        words = ["--home", str(self.home.folder), "eval", str(model), "--data", str(self.rows), "--json"]
        return main([*words, *more, *(["--adapter", str(adapter)] if adapter else [])])


@pytest.fixture
def chain(tmp_path: Path, base_of: MakeBase, parties: Parties) -> Chain:
    return Chain(tmp_path, base_of(), parties)


def test_what_belongs_together_is_scored(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert chain.eval(chain.bundle.folder, chain.returned.folder) == 0
    assert "no signature" not in capsys.readouterr().err
    losses = []
    for model, adapter in ((chain.base, chain.adapter), (chain.merged, None)):
        assert chain.eval(model, adapter) == 0
        printed = capsys.readouterr()
        losses.append(json.loads(printed.out)["loss"])
        assert (f"{chain.base} has no signature" in printed.err) == (model == chain.base)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_adapter_of_another_model_is_refused(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error names the step that works."""
    for model, adapter, says in (
        (chain.base, chain.returned.folder, f"`offsite plug-in BASE {chain.returned.folder} --out PLUGGED`"),
        (chain.other.folder, chain.returned.folder, "is another bundle"),
        (chain.merged, chain.returned.folder, "is no bundle"),
        (chain.bundle.folder, chain.adapter, "name the base's folder"),
        (chain.base, chain.merged, f"`offsite eval {chain.merged} --data FILE`"),
    ):
        assert chain.eval(model, adapter) == IncompatibleError.exit_code, says
        error = json.loads(capsys.readouterr().out)["error"]
        assert says in f"{error['what']} {error['next_step']}"
    assert chain.eval(chain.returned.folder) == 2
    assert f"--adapter {chain.returned.folder}`" in capsys.readouterr().out
    assert chain.eval(chain.base, chain.bundle.folder) == 2
    assert "without --adapter" in capsys.readouterr().out


def test_a_plug_in_of_another_base_is_refused(
    chain: Chain, tmp_path: Path, base_of: MakeBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shapes fit, so only the owner's fingerprint tells the two bases apart."""
    assert chain.eval(base_of(seed=5), chain.adapter) == IncompatibleError.exit_code
    assert "was made for another base" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bundle", "return", "adapter", "merged"])
def test_a_flipped_bit_is_not_scored(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Nor are rows checked for it."""
    spoiled = copied_folder(tmp_path / kind, tmp_path / "spoiled")
    weights = next(iter(sorted(spoiled.glob("*.safetensors"))))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    models = {"return": (chain.bundle.folder, spoiled), "adapter": (chain.base, spoiled)}
    for more in ((), ("--check",)):
        assert chain.eval(*models.get(kind, (spoiled, None)), *more) == VerificationError.exit_code
        assert weights.name in capsys.readouterr().out


def test_half_of_a_signature_is_no_unsigned_folder(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its manifest, a return would be scored on any model with blocks of these numbers."""
    (chain.returned.folder / MANIFEST).unlink()
    assert chain.eval(chain.base, chain.returned.folder) == 2
    assert f"holds no {MANIFEST}" in capsys.readouterr().out


def test_a_check_of_rows_refuses_what_the_evaluation_refuses(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    assert chain.eval(chain.base, chain.returned.folder, "--check") == IncompatibleError.exit_code
    assert "`offsite plug-in BASE" in capsys.readouterr().out
    assert chain.eval(chain.bundle.folder, chain.returned.folder, "--check") == 0
