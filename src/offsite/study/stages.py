"""The stages of a study, content-addressed: a stage's key is the digest of everything that determines its result.

The digest covers its settings, the bytes of base and rows, the keys of the stages it needs, this version and its
formats. So points of the grid that need the same stage share it, and a result on disk is never computed again.
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
from offsite.study.resumable_chain import OWNER, TUNER
from offsite.study.run_command import Words

EXPERIMENTER = "experimenter"  # runs the stages that need the files of both parties, as neither party could
PARTIES = (OWNER, TUNER, EXPERIMENTER)
_STAGES = 1  # part of every key; raise it when the meaning of a stage changes between versions
# Settings about which blocks train and which returns are accepted; all others of PackSpec are about compression.
_PLACEMENT = PackSpec.keys_of("split", "permits", "runtime") | {"dtype"}


@dataclass(frozen=True)
class Stage:
    """One command of a party: its words and settings, the stages whose output it needs, and its own output path."""

    name: str
    description: str
    party: str
    key: str
    out: Path
    words: Words  # after --home
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # tables of its --config file
    needs: tuple["Stage", ...] = ()
    copies: Path | None = None  # the other party's artifact, copied to `out` before the command runs
    large: bool = False  # whether the output is a complete model, which can be computed again if it is removed


@dataclass(frozen=True)
class Rows:
    """The training and test files of a data set, as a study uses them; `digest` identifies their content."""

    train: Path
    test: Path
    digest: str
    pictures: bool = False


@dataclass(frozen=True)
class Workspace:
    """The folder of a study and its base model; each method returns the description of one stage, and runs nothing.

    The folder has `model-owner/` and `data-owner/`, each with its own home, and `experimenter/`.
    """

    folder: Path
    base: Path
    base_digest: str
    eval: EvalSpec
    plug_in: PlugInSpec

    def pack_stage(self, spec: PackSpec) -> Stage:
        """The stage in which the model's owner packs a bundle."""
        words: Words = ["pack", self.base, "--for", TUNER, "--no-score", *(["--resume"] if spec.resumable else [])]
        inputs = {"base": self.base_digest, "spec": settings_by_content(spec)}
        return self._stage("pack", OWNER, "bundles", words, inputs, settings={"pack": spec})

    def verify_bundle_stage(self, pack: Stage) -> Stage:
        """The stage in which the bundle is copied to the data owner, who verifies it."""
        return self._stage("verify bundle", TUNER, "bundles", ["verify"], {}, (pack,), copies=pack.out)

    def tune_stage(self, bundle: Stage, spec: TuneSpec, rows: Rows) -> Stage:
        """The stage in which the data owner tunes the adapter."""
        words: Words = ["tune", bundle.out, *self._tuning(spec, rows)]
        inputs = {"spec": settings_by_content(spec), "rows": rows.digest}
        return self._stage("tune", TUNER, "returns", words, inputs, (bundle,), settings={"tune": spec})

    def verify_return_stage(self, tune: Stage) -> Stage:
        """The stage in which the return is copied to the model's owner, who verifies it."""
        return self._stage("verify return", OWNER, "returns", ["verify"], {}, (tune,), copies=tune.out)

    def plug_in_stage(self, returned: Stage) -> Stage:
        """The stage in which the model's owner plugs the return in; a study may repeat it with other settings."""
        words: Words = ["plug-in", self.base, returned.out, "--again"]
        inputs = {"spec": settings_by_content(self.plug_in)}
        settings = {"plug-in": self.plug_in}
        return self._stage("plug-in", OWNER, "plug-ins", words, inputs, (returned,), settings=settings, large=True)

    def full_fine_tuning_stage(self, spec: TuneSpec, rows: Rows) -> Stage:
        """The stage in which the experimenter tunes all weights of the base; neither party alone could do this."""
        words: Words = ["full-fine-tuning", self.base, *self._tuning(spec, rows)]
        inputs = {"base": self.base_digest, "spec": settings_by_content(spec), "rows": rows.digest}
        settings = {"tune": spec}
        return self._stage("full fine-tuning", EXPERIMENTER, "full", words, inputs, settings=settings, large=True)

    def score_stage(self, rows: Rows, row: str, model: Stage | None = None, adapter: Stage | None = None) -> Stage:
        """The stage in which the experimenter scores a model on the test rows.

        A plug-in is either an adapter on the base or a complete model. Which one is known only after it was written, so
        the words name both, and `_eval_words` decides. An encoder without a tuned head is scored by a linear probe that
        is fitted on the training rows.

        Args:
            rows: the data set.
            row: the name of the row of the result table that the score is for.
            model: the stage that wrote the model; None means the base.
            adapter: the stage that wrote the adapter; None if the model is scored without one.
        """
        needs = tuple(stage for stage in (model, adapter) if stage is not None)
        words: Words = ["eval", model.out if model else self.base, "--data", rows.test]
        words += ["--adapter", adapter.out] if adapter else []
        words += ["--probe", rows.train] if rows.pictures and row in ("zero_shot", "emulator_zero_shot") else []
        inputs: dict[str, Any] = {"spec": settings_by_content(self.eval), "rows": rows.digest}
        inputs |= {} if model else {"base": self.base_digest}
        description = f"score {row.replace('_', ' ')}"
        return self._stage(
            "eval", EXPERIMENTER, "scores", words, inputs, needs, settings={"eval": self.eval}, description=description
        )

    def _tuning(self, spec: TuneSpec, rows: Rows) -> Words:
        """The words that a tuning and a full fine-tuning have in common: their data, and --resume."""
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
        description: str = "",
    ) -> Stage:
        """Make a stage; its key is a digest of its inputs, and its output is at `party/place/key` in the folder.

        Args:
            name: the name of the stage, such as "pack".
            party: the party that runs the command, as the name of its folder.
            place: the folder of the outputs of such stages, inside the party's folder.
            words: the command's words after --home.
            inputs: digests of all that the result depends on, apart from the stages in `needs`.
            needs: the stages whose output the command reads.
            settings: specs for the tables of the command's --config file, keyed by table; None for no tables.
            copies: the other party's artifact, copied to the output before the command runs; None if there is none.
            large: whether the output is a complete model.
            description: a description for the user; empty means the name.
        """
        basis = [_STAGES, FORMAT, __version__, name, [stage.key for stage in needs], dict(inputs)]
        key = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:16]
        out = self.folder / party / place / key
        tables = {  # only explicit settings: the command resolves the defaults itself
            table: spec.flat(explicit_only=True) for table, spec in (settings or {}).items()
        }
        return Stage(name, description or name, party, key, out, words, tables, needs, copies, large)


def command_words(stage: Stage, workspace: Workspace, config: Path) -> Words:
    """Build the words of a stage's command; the stages that it needs must already have run."""
    party = OWNER if stage.party == EXPERIMENTER else stage.party  # the owner's home verifies what both parties made
    home: Words = ["--home", workspace.folder / party / "home"]
    words = _eval_words(stage) if stage.name == "eval" else [*stage.words]
    if stage.copies is not None:
        return [*home, *words, stage.out]
    out: Words = ["--row-scores" if stage.name == "eval" else "--out", stage.out]
    settings: Words = ["--config", config] if stage.settings else []
    return [*home, *words, *out, *settings]


def _eval_words(stage: Stage) -> Words:
    """The words of a scoring command: a merged plug-in is scored as a model, any other as an adapter on the base."""
    plug = next((one for one in stage.needs if one.name == "plug-in"), None)
    words = [*stage.words]
    if plug is not None and (plug.out / "config.json").exists():
        words = [words[0], plug.out, *words[2 : words.index("--adapter")]]
    return words


def uncompressed_spec(spec: PackSpec, middle: int) -> PackSpec:
    """Pack settings with the trained blocks of `spec` but without compression: all `middle` blocks stay unchanged.

    Args:
        spec: the pack settings of a compressor.
        middle: the number of middle blocks of the base.
    """
    placement = {key: value for key, value in spec.flat(explicit_only=True).items() if key in _PLACEMENT}
    return PackSpec(**placement, keep=middle, heal=())


def settings_by_content(spec: Spec) -> dict[str, Any]:
    """The settings of a spec by key, for the digest in a stage's key; a path is replaced by a digest of its content."""
    files = {key: data_digest(value) for key, value in spec.values().items() if isinstance(value, Path)}
    return spec.flat() | files


def with_prerequisites(stage: Stage) -> Iterator[Stage]:
    """Yield the stages that a stage needs, directly or indirectly, and then the stage itself."""
    for need in stage.needs:
        yield from with_prerequisites(need)
    yield stage
