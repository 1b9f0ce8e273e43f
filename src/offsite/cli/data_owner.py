"""The verb of the party that owns data: tune."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import flags, inspect_verbs, terminal
from offsite.cli.setting_flags import FlagValues
from offsite.cli.show_plan import show_plan
from offsite.training.run_log import log_file

if TYPE_CHECKING:
    from offsite.config import TuneSpec
    from offsite.data_owner.plan import TunePlan
    from offsite.progress import Event, Progress
    from offsite.protocol.artifacts import Bundle, Return
    from offsite.protocol.home import Home
    from offsite.protocol.manifest import BundleManifest
    from offsite.training.processes import Processes


def tune(
    context: typer.Context,
    flag_values: FlagValues,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder that the model's owner sent")],
    data: Annotated[list[Path], flags.DATA_OPTION],
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="new folder for the return")] = None,
    eval_data: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="held-out rows to validate on; several are joined")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="FOLDER", help="log for TensorBoard as well")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run, bit for bit")] = False,
    plan: flags.PlanFlag = None,
    check: flags.CheckFlag = False,
    config: flags.ConfigFlag = None,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Verify a bundle, train its adapter on your data, and make a signed return.

    The data stay here: a return holds tensors and settings, and its contents are listed before anything trains.
    The log of the run, OUT.log.jsonl next to the return, has every step's loss and stays here too.

    Example:
      offsite tune bundle/ --data train.jsonl --eval-data test.jsonl --out return/
    """
    from offsite.config import TuneSpec
    from offsite.errors import UsageError

    processes = flags.run_of(context).processes
    spec, measured = flags.settings(TuneSpec, config, flag_values), flags.measures(plan)
    if (plan or check) and not processes.first:
        return
    eval_data = eval_data or None
    if check and (plan or resume):
        raise UsageError(
            "--check was given with --plan or --resume", next_step="give one of them; --check trains nothing"
        )
    if out is None and not check:
        raise UsageError("the return has no folder to go to", next_step="name a new one: --out return/")
    from offsite.data_owner.check_permissions import require_permitted, require_something_to_report
    from offsite.data_owner.check_tuning import require_addressed
    from offsite.progress import Event
    from offsite.protocol.manifest import MANIFEST
    from offsite.protocol.verify import verify_bundle

    require_something_to_report(spec, eval_data)
    own = flags.home_of(context, home)
    with terminal.showing_progress() as progress, _agreed(processes, alone=bool(plan or check)):
        progress(Event("verifying the bundle", 0))
        verified = verify_bundle(bundle, own, hold=not (plan or check) or measured)
    require_addressed(verified, own.identity())
    require_permitted(verified.manifest, spec)
    if check or out is None:
        from offsite.cli.show_check import show_checks
        from offsite.data_owner.check_tuning_data import check_tuning_data

        with terminal.showing_progress() as progress:
            checks = check_tuning_data(verified, data, eval_data, spec, progress)
        raise typer.Exit(show_checks(checks, as_json=as_json))
    log = log_file(out)
    finished: Return | None = None
    with _agreed(processes, alone=bool(plan)):
        if resume and processes.first and (out / MANIFEST).exists():
            from offsite.data_owner.tune import finished_return

            several = processes.count > 1 and not plan
            finished = finished_return(verified, data, out, spec, own, eval_data=eval_data, several=several)
    if finished is not None if plan else processes.from_first(finished is not None):
        if finished is not None:
            terminal.say(f"this run is finished: {out} is the return that it made, and nothing was done")
            _show(finished, own, _facts(log, as_json=as_json), as_json=as_json)
        return
    if plan:
        planned = _plan(verified, data, out, spec, own, eval_data, tensorboard, resume=resume, measured=measured)
        show_plan(planned, out, as_json=as_json)
        terminal.hint("next: the same command without --plan")
        return
    from offsite.data_owner.tune import tune_in_processes

    started = time.monotonic()
    with terminal.showing_progress() as progress:
        announcing = _announcing(promise(verified.manifest, spec), progress)
        returned = tune_in_processes(
            verified,
            data,
            out,
            spec,
            own,
            eval_data=eval_data,
            tensorboard=tensorboard,
            resume=resume,
            progress=announcing,
            processes=processes,
        )
    if returned is None:  # only the first of several processes has something to show
        return
    seconds = round(time.monotonic() - started, 1)
    _show(returned, own, {"seconds": seconds, **_facts(log, as_json=as_json)}, as_json=as_json)


def _agreed(processes: "Processes", *, alone: bool) -> contextlib.AbstractContextManager[None]:
    """Context manager: if its body fails in one process, all fail; `alone` says that the first one runs it alone."""
    return contextlib.nullcontext() if alone else processes.together()


def _facts(log: Path, *, as_json: bool) -> dict[str, Any]:
    """The first and last losses in the log of a tuning run; for JSON also a report on the kernels that were used."""
    from offsite.training.run_log import last_record

    kernels = last_record(log, "kernels")
    last = inspect_verbs.last_losses(log, "step", "validation", "same rows")
    if last:
        last = {"losses_of": "emulator", **last}
    if kernels is None or not as_json:
        return last
    return {**last, "kernels": {name: kernels[name] for name in ("backend", "pieces")}}


def _plan(
    bundle: "Bundle",
    data: list[Path],
    out: Path,
    spec: "TuneSpec",
    home: "Home",
    eval_data: list[Path] | None,
    tensorboard: Path | None,
    *,
    resume: bool,
    measured: bool,
) -> "TunePlan":
    """Plan the tuning; with `measured`, also train two steps to measure memory and time."""
    from offsite.data_owner.plan import plan_tune

    with terminal.showing_progress() as progress:
        plan, prepared = plan_tune(
            bundle,
            data,
            out,
            spec,
            home,
            eval_data=eval_data,
            tensorboard=tensorboard,
            resume=resume,
            progress=progress,
        )
        if not measured:
            return plan
        from offsite.data_owner.measure_tuning import measure_tuning

        return measure_tuning(bundle, plan, prepared, progress)


def _show(returned: "Return", home: "Home", tuning: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the description of a return, and the results of the tuning run, which the return does not contain."""
    terminal.show({**inspect_verbs.describe(returned, home), "tuning": tuning}, as_json=as_json)
    if "log" in tuning:
        terminal.say(
            "these losses are those of the emulator, not of the plug-in, which only the model's owner can score: "
            "ask for its scores (`offsite plug-in --eval-data`)"
        )
        terminal.say(f"the log {tuning['log']} stays with you: it is no part of the return")
    terminal.hint_command("inspect", returned.folder)
    terminal.hint("then send the folder to the model's owner")


def _announcing(promised: str, progress: "Progress") -> "Progress":
    """Make a progress callback that prints `promised` before the model is loaded, after all checks."""

    def advance(event: "Event") -> None:
        if event.stage == "loading the model":
            terminal.say(promised)
        progress(event)

    return advance


def promise(manifest: "BundleManifest", spec: "TuneSpec") -> str:
    """A sentence that lists everything that the return will contain: all files, and tensors by block."""
    from offsite.data_owner.return_manifest import returned_tensors
    from offsite.protocol.contents import ADAPTER_CONFIG, CLASSIFIER, WEIGHTS_OF, checkpoint_file
    from offsite.protocol.manifest import MANIFEST, SIGNATURE

    tensors = returned_tensors(manifest, spec)
    numbers = inspect_verbs.numbers_in(tensors.values())
    earlier = [checkpoint_file(number) for number in range(1, spec.points.checkpoints)]
    files = [WEIGHTS_OF[spec.adapter.method], *earlier, MANIFEST, SIGNATURE]
    if spec.adapter.method == "lora":
        files = [ADAPTER_CONFIG, *files]
        family = manifest.family
        linears = sorted({place[1] for name in manifest.lora_targets if (place := family.linear_layer_of(name))})
        what = f"LoRA pairs of rank {spec.adapter.rank} on {', '.join(linears)}"
    elif spec.adapter.method == "bottleneck":
        what = f"bottlenecks of width {spec.adapter.width} behind attention and MLP"
    else:
        what = "their biases" if spec.adapter.method == "bitfit" else "their own weights"
    if spec.adapter.tune_head:
        what += ", and the model's output head"
    vision = manifest.family.vision is not None
    if vision:
        files = sorted([*files, CLASSIFIER])
    also = ", and a classifier with the NAMES OF YOUR CLASSES" if vision else ""
    blocks = inspect_verbs.ranges(manifest.split.trained)
    size = f"{len(tensors)} tensors, {numbers:,} numbers, {4 * numbers / 2**20:.1f} MiB"
    if earlier:
        size = f"in each of {spec.points.checkpoints} checkpoints {size}"
    losses = "no losses"
    if spec.points.report_scores:
        losses = f"but the held-out loss of {'each checkpoint' if earlier else 'what trained'}, as --report-scores asks"
    return (
        f"the return will hold {', '.join(files)} and nothing else: for blocks {blocks} of the bundle, {what} "
        f"({size}){also}; no paths, no {'other ' if vision else ''}names, no row counts, {losses}"
    )
