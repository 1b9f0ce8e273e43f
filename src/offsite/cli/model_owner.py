"""The commands of the party that owns a model: import, pack, plug-in."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli import flags, inspect_verbs, terminal
from offsite.cli import show_choice as choice
from offsite.cli import show_transfer as transfer
from offsite.cli.setting_flags import FlagValues
from offsite.cli.show_plan import show_plan
from offsite.training.run_log import last_record, log_file

if TYPE_CHECKING:
    from offsite.config import PackSpec
    from offsite.model_owner.plan import PackPlan
    from offsite.model_owner.plugging_in.choose_plug_in import Choice
    from offsite.model_owner.plugging_in.score_plug_in import Transfer
    from offsite.protocol.artifacts import Base, PlugIn
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
    terminal.hint_command("pack", out, "--out", "bundle/", "--for", "NAME")


def pack(
    context: typer.Context,
    flag_values: FlagValues,
    base: _BaseFolder,
    out: _Out,
    recipient: Annotated[str, typer.Option("--for", metavar="NAME", help="the trusted party that may tune it")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="continue an interrupted distillation or search; other healing continues by itself"
        ),
    ] = False,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="score emulator and base on the same text at the end")
    ] = True,
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
    At the end, emulator and base are scored on the same text: the data owner tunes the emulator, and one that is far
    from the base may transfer little. The losses are kept in the ledger, where only you see them.

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
        terminal.hint("next: the same command without --plan")
        return
    from offsite.model_owner.pack import PACKING
    from offsite.model_owner.pack import pack as pack_stage

    with terminal.showing_progress() as progress:
        model = Base(base)
        bundle = pack_stage(model, out, recipient, spec, own, progress, resume=resume)
        if score:
            from offsite.model_owner.score_emulator import score_emulator

            score_emulator(model, bundle, spec, own, progress)
    made = last_record(log_file(out), PACKING) or {}
    shown = {**inspect_verbs.describe(bundle, own), "emulator": made.get("emulator")}
    if any(step.name == "distill" for step in spec.healing_steps):
        shown["distillation"] = inspect_verbs.last_losses(log_file(out), "distill step", "distill held out")
    terminal.show(shown, as_json=as_json)
    terminal.hint(f"send the folder {out} to {recipient}, who runs `offsite verify {shlex.quote(str(out.name))}`")
    terminal.hint_command("inspect", out)


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
    eval_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="score base and plug-in on these rows, and compare them")
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
    With --eval-data, base and plug-in are scored on rows of your own (others than those of --choose-on): the losses
    that the data owner saw are those of the emulator.

    Example:
      offsite plug-in base/ return/ --out plugged/
      offsite plug-in base/ return/ --out plugged/ --eval-data public.jsonl
    """
    from offsite.config import EvalSpec, PlugInSpec

    spec = flags.settings(PlugInSpec, config, flag_values)
    of_rows = {"--choose-on": choose_on, "--eval-data": eval_data}
    _require_used({name for name, file in of_rows.items() if file is not None}, flag_values, plan)
    from offsite.protocol.artifacts import Base

    own, model = flags.home_of(context, home), Base(base)
    if plan:
        from offsite.model_owner.plugging_in.plan_plug_in import plan_plug_in

        with terminal.showing_progress() as progress:
            planned = plan_plug_in(model, returned, out, spec, own, progress)
        show_plan(planned, out, as_json=as_json)
        terminal.hint("next: the same command without --plan")
        return
    from offsite.model_owner.intake import intake
    from offsite.model_owner.plugging_in.plug_in import open_base_of
    from offsite.model_owner.plugging_in.plug_in import plug_in as plug_in_stage
    from offsite.progress import Event
    from offsite.protocol.output_place import require_place

    scores = choose_on is not None or eval_data is not None
    measured = flags.settings(EvalSpec, config, {}) if scores else EvalSpec()  # it scores as `offsite eval` does
    if spec.explicit_keys & {"columns", "chosen"}:
        measured = measured.changed({"columns": spec.columns, "chosen": spec.chosen})
    require_place(out, base, returned, choose_on, eval_data)  # before the work, and before the ledger's entry
    with terminal.showing_progress() as progress:
        progress(Event("verifying the return", 0))
        accepted = intake(returned, own)
        chosen, compared = None, None
        if eval_data is not None:
            from offsite.model_owner.plugging_in.score_plug_in import score_base, score_plug_in

            open_base_of(accepted, model, spec, own, progress)  # its refusals come before the work
            of_base = score_base(model, eval_data, measured, progress)
        if choose_on is not None:
            from offsite.model_owner.plugging_in.choose_plug_in import choose

            chosen = choose(model, accepted, choose_on, spec, measured, own, progress)
            best = {"checkpoint": chosen.best.checkpoint, "strength": chosen.best.strength}
            spec = spec.changed(best)
        plugged = plug_in_stage(model, accepted, out, spec, own, progress)
        if eval_data is not None:
            compared = score_plug_in(model, plugged, eval_data, measured, of_base, progress)
    _show_plug_in(plugged, own, chosen, compared, as_json=as_json)
    if compared is not None and eval_data == choose_on:
        terminal.say("warning: the rows of --eval-data chose the plug-in, so they flatter it; score it on others")
    if spec.whole is not None:
        terminal.hint(f"load it with transformers, as the checkpoint in {spec.whole}")
        return
    terminal.hint_command("compare", base, out, "--data", "test.jsonl")


def _require_used(of_rows: Collection[str], flag_values: FlagValues, plan: str | None) -> None:
    """Check that no flag of `plug-in` is given that would have no effect, or that a plan cannot follow.

    Args:
        of_rows: those of the flags --choose-on and --eval-data that were given.
        flag_values: the flags of the settings.
        plan: the value of --plan; None: left out.

    Raises:
        UsageError: a flag would have no effect, or does not go with --plan.
    """
    from offsite.errors import UsageError

    if "--choose-on" not in of_rows and flag_values["strengths"] is not None:
        raise UsageError(
            "--strengths are to choose from, and there are no rows to choose on",
            next_step="name rows of your own with --choose-on, or give one --strength",
        )
    unread = [f"--{key}" for key in ("columns", "chosen") if flag_values[key] is not None]
    if not of_rows and unread:
        raise UsageError(
            f"{' and '.join(unread)} tell how rows are read, and there are none",
            next_step="name rows of your own with --choose-on or --eval-data, or leave these out",
        )
    if flags.measures(plan):
        raise UsageError(
            "plugging in runs no network, so there is nothing to measure",
            next_step="give --plan alone: it says what will be written, and checks what the run checks",
        )
    if of_rows and plan:
        named = " and ".join(sorted(of_rows))
        raise UsageError(
            f"--plan does not know what {named} needs",
            next_step=f"leave {named} out of the plan; scoring holds the base in memory, as `offsite eval` does",
        )


def _show_plug_in(
    plugged: "PlugIn", home: "Home", chosen: "Choice | None", compared: "Transfer | None", *, as_json: bool
) -> None:
    """Print the description of a plug-in, how it was chosen, and how it compares with the base, with warnings.

    `chosen` and `compared` are None if nothing was chosen, or compared.
    """
    shown = inspect_verbs.describe(plugged, home)
    if as_json:
        shown |= {"choice": choice.facts(chosen)} if chosen else {}
        shown |= {"transfer": transfer.facts(compared)} if compared else {}
    elif chosen:
        for line in choice.lines(chosen):
            typer.echo(line)
    terminal.show(shown, as_json=as_json)
    if compared is None:
        return
    for line in [] if as_json else transfer.lines(compared):
        typer.echo(line)
    for line in transfer.warnings(compared):
        terminal.say(line)
