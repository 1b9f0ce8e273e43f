"""The commands of the party that owns a model: import, pack, plug-in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli import flags, inspect_verbs, terminal
from offsite.cli import show_choice as choice
from offsite.cli.setting_flags import FlagValues
from offsite.cli.show_plan import show_plan
from offsite.training.run_log import last_record, log_file

if TYPE_CHECKING:
    from offsite.config import PackSpec
    from offsite.model_owner.plan import PackPlan
    from offsite.protocol.artifacts import Base
    from offsite.protocol.home import Home

_Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="new folder for the result")]
_BaseFolder = Annotated[Path, typer.Argument(metavar="BASE", help="base checkpoint folder, as import wrote it")]


def import_(
    context: typer.Context,
    flag_values: FlagValues,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="a .gguf or .onnx file, a folder that transformers reads, or hub:ORG/NAME"
        ),
    ],
    out: _Out,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Turn a model into a base folder: safetensors, config and tokenizer.

    With hub:ORG/NAME the model is downloaded from the Hugging Face hub into the hub's cache first; @REVISION names a
    version, and /FILE.gguf one of several files. Code of a repository is never fetched or run.

    Example:
      offsite import model.gguf --out base/
      offsite import hub:HuggingFaceTB/SmolLM2-135M-Instruct --out base/
    """
    from offsite.config import ImportSpec

    spec = flags.settings(ImportSpec, config, flag_values)
    from offsite.model_owner.importing.import_model import import_model

    with terminal.showing_progress() as progress:
        base = import_model(source, out, spec, progress)
    terminal.show(inspect_verbs.describe_base(base.folder), as_json=as_json)
    terminal.hint(f"next: offsite pack {out} --out bundle/ --for NAME")


def pack(
    context: typer.Context,
    flag_values: FlagValues,
    base: _BaseFolder,
    out: _Out,
    recipient: Annotated[str, typer.Option("--for", metavar="NAME", help="the trusted party that may tune it")],
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted distillation or search")] = False,
    plan: flags.PlanFlag = None,
    config: flags.ConfigFlag = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Make a signed bundle for one data owner: the blocks to train, and an emulator in place of the rest.

    By default the emulator is the middle of the model with half of its weights pruned, which gives the best plug-in.
    With --keep it has a few of the middle blocks, which makes tuning fastest. With --placement every, no block goes out
    as it is in the base: all blocks are compressed, and the adapter trains in all of them. Defaults follow the model's
    family; a line of the output says how the emulator was made. The bundle is an ordinary Hugging Face checkpoint,
    unless the emulator shares, quantises, factorises or narrows its blocks, is stored without its zeros, or has affine
    layers after its blocks. The bundle is recorded in the home's ledger. The log is OUT.log.jsonl, next to the bundle.

    Example:
      offsite pack base/ --out bundle/ --for hospital --bottom 4 --top 6
      offsite pack base/ --out bundle/ --for hospital --keep 8 --heal refit,distill
      offsite pack base/ --out bundle/ --for hospital --placement every --bits 4
    """
    from offsite.config import PackSpec

    spec, measured = flags.settings(PackSpec, config, flag_values), flags.measures(plan)
    from offsite.protocol.artifacts import Base

    own = flags.home_of(context, home)
    if plan:
        planned = _plan_pack(Base(base), out, recipient, spec, own, resume=resume, measured=measured)
        show_plan(planned, out, as_json=as_json)
        return
    from offsite.model_owner.pack import PACKING
    from offsite.model_owner.pack import pack as pack_stage

    with terminal.showing_progress() as progress:
        bundle = pack_stage(Base(base), out, recipient, spec, own, progress, resume=resume)
    made = last_record(log_file(out), PACKING) or {}
    shown = {**inspect_verbs.describe(bundle, own), "emulator": made.get("emulator")}
    if any(step.name == "distill" for step in spec.healing_steps):
        shown["distillation"] = inspect_verbs.last_losses(log_file(out), "distill step", "distill held out")
    terminal.show(shown, as_json=as_json)
    terminal.hint(f"next: send the folder {out} to {recipient}")


def _plan_pack(
    base: "Base", out: Path, recipient: str, spec: "PackSpec", home: "Home", *, resume: bool, measured: bool
) -> "PackPlan":
    """Plan the packing; with `measured`, also run a part of it to measure memory and time."""
    from offsite.model_owner.plan import plan_pack

    plan, checked = plan_pack(base, out, recipient, spec, home, resume=resume)
    if not measured:
        return plan
    from offsite.model_owner.measure_packing import measure_packing

    with terminal.showing_progress() as progress:
        return measure_packing(plan, checked, progress)


def plug_in(
    context: typer.Context,
    flag_values: FlagValues,
    base: _BaseFolder,
    returned: Annotated[Path, typer.Argument(metavar="RETURN", help="the folder that the data owner sent back")],
    out: _Out,
    choose_on: Annotated[
        Path | None, typer.Option(metavar="FILE", help="choose checkpoint and strength by the loss on these rows")
    ] = None,
    plan: flags.PlanFlag = None,
    config: flags.ConfigFlag = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Check a return against the ledger and put it into the base model.

    As an adapter, the result is an ordinary PEFT folder for the base; merged, it is a complete checkpoint. With --whole
    it is the multi-modal checkpoint that the base was imported from, with its language model replaced.
    With --choose-on, every checkpoint of the return is scored at every strength on rows of your own, and the best wins.

    Example:
      offsite plug-in base/ return/ --out plugged/
    """
    from offsite.config import EvalSpec, PlugInSpec
    from offsite.errors import UsageError

    spec = flags.settings(PlugInSpec, config, flag_values)
    if choose_on is None and flag_values["strengths"] is not None:
        raise UsageError(
            "--strengths are to choose from, and there are no rows to choose on",
            next_step="name rows of your own with --choose-on, or give one --strength",
        )
    of_rows = [key for key in ("columns", "chosen") if flag_values[key] is not None]
    if choose_on is None and of_rows:
        raise UsageError(
            f"{' and '.join(f'--{key}' for key in of_rows)} tell how rows to choose on are read, and there are none",
            next_step="name rows of your own with --choose-on, or leave these out",
        )
    if flags.measures(plan):
        raise UsageError(
            "plugging in runs no network, so there is nothing to measure",
            next_step="give --plan alone: it says what will be written, and checks what the run checks",
        )
    if choose_on is not None and plan:
        raise UsageError(
            "--plan does not know what --choose-on needs",
            next_step="leave --choose-on out of the plan; choosing holds the base in memory, as `offsite eval` does",
        )
    from offsite.protocol.artifacts import Base

    own, model = flags.home_of(context, home), Base(base)
    if plan:
        from offsite.model_owner.plugging_in.plan_plug_in import plan_plug_in

        with terminal.showing_progress() as progress:
            planned = plan_plug_in(model, returned, out, spec, own, progress)
        show_plan(planned, out, as_json=as_json)
        return
    from offsite.model_owner.intake import intake
    from offsite.model_owner.plugging_in.plug_in import plug_in as plug_in_stage
    from offsite.progress import Event
    from offsite.protocol.output_place import require_place

    measured = flags.settings(EvalSpec, config, {}) if choose_on else EvalSpec()  # it scores as `offsite eval` does
    require_place(out, base, returned, choose_on)  # before the work, and before the ledger's entry
    with terminal.showing_progress() as progress:
        progress(Event("verifying the return", 0))
        accepted = intake(returned, own)
        chosen = None
        if choose_on is not None:
            from offsite.model_owner.plugging_in.choose_plug_in import choose

            chosen = choose(model, accepted, choose_on, spec, measured, own, progress)
            best = {"checkpoint": chosen.best.checkpoint, "strength": chosen.best.strength}
            spec = spec.changed(best)
        plugged = plug_in_stage(model, accepted, out, spec, own, progress)
    if chosen and not as_json:
        for line in choice.lines(chosen):
            typer.echo(line)
    shown = inspect_verbs.describe(plugged, own)
    terminal.show({**shown, "choice": choice.facts(chosen)} if chosen and as_json else shown, as_json=as_json)
    if spec.whole is not None:
        terminal.hint(f"next: load it with transformers, as the checkpoint in {spec.whole}")
        return
    scored = f"{base} --adapter {out}" if plugged.manifest.form == "adapter" else f"{out}"
    terminal.hint(f"next: offsite eval {scored} --data test.jsonl")
