"""The stages of a study, content-addressed: a stage's key is the digest of everything that determines its result.

That is its settings, the bytes of base and rows, the keys of the stages before it, this version and its formats. So
cells that agree in a stage share it, and what is there under its key is never computed again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite import __version__
from offsite.config import EvalSpec, PackSpec, PlugInSpec, Spec, TuneSpec
from offsite.data.data_files import data_digest
from offsite.protocol.manifest import FORMAT
from offsite.study.chain import OWNER, TUNER
from offsite.study.command import Words

EXPERIMENTER = "experimenter"  # what no party does: it sees all
PARTIES = (OWNER, TUNER, EXPERIMENTER)
_STAGES = 1  # what a stage does; raise it when that changes between versions
# Settings that say where blocks train and what may come back; all others of PackSpec say how the rest is compressed.
_PLACEMENT = PackSpec.keys_of("split", "permits", "runtime") | {"dtype"}


@dataclass(frozen=True)
class Stage:
    """One command of a party, with what it takes and what it makes."""

    name: str
    says: str
    party: str
    key: str
    out: Path
    words: Words  # after --home
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # tables of its --config file
    needs: tuple["Stage", ...] = ()
    copies: Path | None = None  # what comes over the wire to `out` first
    large: bool = False  # a whole model, which can be made again from what is kept


@dataclass(frozen=True)
class Rows:
    """A data set in the data owner's folder."""

    train: Path
    test: Path
    digest: str
    pictures: bool = False


@dataclass(frozen=True)
class Lab:
    """The folder of a study: `model-owner/`, `data-owner/` and `experimenter/`, each party's with its own home."""

    folder: Path
    base: Path
    base_digest: str
    eval: EvalSpec
    plug_in: PlugInSpec

    def pack(self, spec: PackSpec) -> Stage:
        """The model's owner packs a bundle."""
        words: Words = ["pack", self.base, "--for", TUNER, *(["--resume"] if spec.resumable else [])]
        inputs = {"base": self.base_digest, "spec": addressed(spec)}
        return self._stage("pack", OWNER, "bundles", words, inputs, settings={"pack": spec})

    def received(self, pack: Stage) -> Stage:
        """The bundle crosses the wire, and the data owner verifies it."""
        return self._stage("verify bundle", TUNER, "bundles", ["verify"], {}, (pack,), copies=pack.out)

    def tune(self, bundle: Stage, spec: TuneSpec, rows: Rows) -> Stage:
        """The data owner tunes the adapter."""
        words: Words = ["tune", bundle.out, *self._tuning(spec, rows)]
        inputs = {"spec": addressed(spec), "rows": rows.digest}
        return self._stage("tune", TUNER, "returns", words, inputs, (bundle,), settings={"tune": spec})

    def returned(self, tune: Stage) -> Stage:
        """The return crosses the wire, and the model's owner verifies it."""
        return self._stage("verify return", OWNER, "returns", ["verify"], {}, (tune,), copies=tune.out)

    def plugged_in(self, returned: Stage) -> Stage:
        """The model's owner plugs the return in; a study may do so again with other settings."""
        words: Words = ["plug-in", self.base, returned.out, "--again"]
        inputs = {"spec": addressed(self.plug_in)}
        settings = {"plug-in": self.plug_in}
        return self._stage("plug-in", OWNER, "plug-ins", words, inputs, (returned,), settings=settings, large=True)

    def full(self, spec: TuneSpec, rows: Rows) -> Stage:
        """The experimenter tunes the whole base, which neither party could."""
        words: Words = ["full-fine-tuning", self.base, *self._tuning(spec, rows)]
        inputs = {"base": self.base_digest, "spec": addressed(spec), "rows": rows.digest}
        settings = {"tune": spec}
        return self._stage("full fine-tuning", EXPERIMENTER, "full", words, inputs, settings=settings, large=True)

    def score(self, rows: Rows, row: str, model: Stage | None = None, adapter: Stage | None = None) -> Stage:
        """The experimenter scores the test rows: the base, or what a stage made, with what was tuned on it.

        A plug-in is a folder beside the base or in its place, which only shows once it is there; so words name both,
        and `_scored_words` decides. An encoder on which nothing was tuned is scored by a probe of the training rows.
        """
        needs = tuple(stage for stage in (model, adapter) if stage is not None)
        words: Words = ["eval", model.out if model else self.base, "--data", rows.test]
        words += ["--adapter", adapter.out] if adapter else []
        words += ["--probe", rows.train] if rows.pictures and row in ("zero_shot", "emulator_zero_shot") else []
        inputs: dict[str, Any] = {"spec": addressed(self.eval), "rows": rows.digest}
        inputs |= {} if model else {"base": self.base_digest}
        says = f"score {row.replace('_', ' ')}"
        return self._stage(
            "eval", EXPERIMENTER, "scores", words, inputs, needs, settings={"eval": self.eval}, says=says
        )

    def _tuning(self, spec: TuneSpec, rows: Rows) -> Words:
        validation: Words = ["--eval-data", rows.test] if spec.points.eval_every or spec.points.report_scores else []
        return ["--data", rows.train, "--resume", *validation]

    def _stage(
        self,
        name: str,
        party: str,
        place: str,
        words: Words,
        inputs: Mapping[str, Any],
        needs: tuple[Stage, ...] = (),
        *,
        settings: Mapping[str, Spec] | None = None,
        copies: Path | None = None,
        large: bool = False,
        says: str = "",
    ) -> Stage:
        basis = [_STAGES, FORMAT, __version__, name, [stage.key for stage in needs], dict(inputs)]
        key = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]
        out = self.folder / party / place / key
        tables = {  # what was left out stays so, for that is not what was asked for
            table: spec.flat(explicit_only=True) for table, spec in (settings or {}).items()
        }
        return Stage(name, says or name, party, key, out, words, tables, needs, copies, large)


def command_words(stage: Stage, lab: Lab, config: Path) -> Words:
    """The words of a stage's command, once the stages before it are done."""
    home: Words = [] if stage.party == EXPERIMENTER else ["--home", lab.folder / stage.party / "home"]
    words = _scored_words(stage) if stage.name == "eval" else [*stage.words]
    if stage.copies is not None:
        return [*home, *words, stage.out]
    out: Words = ["--row-scores" if stage.name == "eval" else "--out", stage.out]
    settings: Words = ["--config", config] if stage.settings else []
    return [*home, *words, *out, *settings]


def _scored_words(stage: Stage) -> Words:
    """A merged plug-in is a model of its own; one in the form of an adapter lies beside the base."""
    plug = next((one for one in stage.needs if one.name == "plug-in"), None)
    words = [*stage.words]
    if plug is not None and (plug.out / "config.json").exists():
        words = [words[0], plug.out, *words[2 : words.index("--adapter")]]
    return words


def uncompressed(spec: PackSpec, middle: int) -> PackSpec:
    """The same blocks train, and nothing of the base's `middle` blocks is dropped or changed: the bound of a cell."""
    kept = {key: value for key, value in spec.values().items() if key in _PLACEMENT}
    return PackSpec(**kept, keep=middle, heal=())


def addressed(spec: Spec) -> dict[str, Any]:
    """The settings as they go into a key: a file by its content, wherever it lies."""
    files = {key: data_digest(value) for key, value in spec.values().items() if isinstance(value, Path)}
    return spec.flat() | files


def before(stage: Stage) -> Iterator[Stage]:
    """A stage and all before it, those first."""
    for need in stage.needs:
        yield from before(need)
    yield stage
