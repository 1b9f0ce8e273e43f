"""The command doctor, which examines the installation, the machine and the home, and tries the whole chain."""

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from offsite.cli import flags, terminal

if TYPE_CHECKING:
    from offsite.study.doctor.finding import Finding


def doctor(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="leave the self-test out")] = False,
    home: flags.HomeFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Examine packages, device, memory, disk and keys, and try the whole chain on a tiny random model.

    The self-test packs, tunes and plugs in within a temporary folder, in about ten seconds; your home is only read.
    What would make a command fail is a problem, everything else is advice. Exits with 0 if there is no problem, else
    with the first problem's code. Nothing is sent anywhere; of keys only fingerprints are printed.

    Example:
      offsite doctor
    """
    import offsite
    from offsite.study.doctor.finding import Finding
    from offsite.study.doctor.home import examine_home
    from offsite.study.doctor.packages import examine_packages

    own = flags.home_of(context, home)
    versions, extras, lacking = examine_packages()
    facts: dict[str, Any] = {"versions": {"offsite": offsite.__version__, **versions}, "extras": extras}
    facts["home"], more = examine_home(own)
    findings = [*lacking, *more]
    if lacking:
        _show(facts, findings, as_json=as_json)  # the rest imports packages that are missing or too old
    try:
        from offsite.study.doctor.machine import examine_machine
    except (ImportError, OSError) as error:  # its files are damaged, or those of a library that it loads
        findings.append(Finding("problem", f"torch cannot be imported: {error}", "install torch again in a new venv"))
        _show(facts, findings, as_json=as_json)
    facts["machine"], more = examine_machine(own.folder)
    findings += more
    if not quick:
        from offsite.study.doctor.self_test import run_self_test

        with terminal.showing_progress() as progress:
            facts["self_test"], more = run_self_test(progress)
        findings += more
    _show(facts, findings, as_json=as_json)


def _show(facts: dict[str, Any], findings: "list[Finding]", *, as_json: bool) -> NoReturn:
    """Print the facts and findings, and end the command with the exit code of the findings."""
    from dataclasses import asdict

    from offsite.study.doctor.finding import exit_code_of

    code = exit_code_of(findings)
    if as_json:
        listed = [asdict(one) for one in findings]
        terminal.show({"kind": "doctor", "well": not code, **facts, "findings": listed}, as_json=True)
        raise typer.Exit(code)
    for title, part in facts.items():
        typer.echo(title.replace("_", " "))
        for line in _lines(part):
            typer.echo(terminal.printable(f"  {line}"))
    typer.echo("")
    for one in sorted(findings, key=lambda one: one.level != "problem"):
        typer.echo(terminal.printable(f"{one.level}: {one.what}\n  next: {one.next_step}"))
    if not code:
        typer.echo("all is well" + (", apart from the advice above" if findings else ""))
    raise typer.Exit(code)


def _lines(part: dict[str, Any]) -> list[str]:
    """The lines of one part of the facts: name and value, and sizes in GiB."""
    shown: dict[str, str] = {}
    for name, value in part.items():
        if name.endswith("_bytes"):
            sizes = value if isinstance(value, dict) else {"": value}
            for place, size in sizes.items():
                shown[f"{name.removesuffix('_bytes')} {place}".strip()] = f"{size / 2**30:,.1f} GiB"
        elif name == "kernels":
            shown[name] = _kernels(value)
        elif name == "seconds":
            shown[name] = ", ".join(f"{step} {seconds}" for step, seconds in value.items())
        elif isinstance(value, list):
            shown[name] = ", ".join(map(str, value)) or "nobody"
        else:
            shown[name] = ("yes" if value else "none") if isinstance(value, bool | None) else str(value)
    width = max(map(len, shown), default=0)
    return [f"{name.replace('_', ' '):<{width}}  {value}" for name, value in shown.items()]


def _kernels(report: dict[str, Any]) -> str:
    """One line of text for the report of the kernels."""
    from offsite.kernels import Piece, Report

    pieces = [Piece(str(one["name"]), int(one["count"]), str(one["reason"])) for one in report.get("pieces", ())]
    return Report(report.get("backend", "reference"), tuple(pieces)).in_words().removeprefix("kernels: ")
