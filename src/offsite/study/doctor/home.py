"""Examines a party's home: its key, the keys that it trusts, and whether both can be read."""

import os
from typing import Any

from offsite.errors import OffsiteError
from offsite.protocol.home import Home
from offsite.study.doctor.finding import Finding


def examine_home(home: Home) -> tuple[dict[str, Any], list[Finding]]:
    """Examine a home; nothing in it is changed.

    Args:
        home: the home, whose folder may not exist yet.

    Returns:
        The facts by name; and what is not as it should be: a problem if a key cannot be read, advice if there is none.
    """
    facts: dict[str, Any] = {"folder": str(home.folder), "key": None, "trusted": None, "ledger": home.ledger.exists()}
    findings = []
    there = next(path for path in (home.folder.absolute(), *home.folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        findings.append(
            Finding(
                "problem", f"{there} cannot be written", "permit it, or name another home with --home or $OFFSITE_HOME"
            )
        )
    if not home.has_identity:
        findings.append(
            Finding(
                "advice",
                f"{home.folder} holds no key yet",
                "make one: `offsite init --owner NAME` if you own a model, `offsite init --data NAME` if you own data",
            )
        )
    else:
        try:
            identity = home.identity()
            facts["key"] = f"{identity.name}: {identity.public_key.fingerprint}"
        except OffsiteError as error:
            findings.append(_problem(error))
    try:
        facts["trusted"] = sorted(home.trusted())
    except OffsiteError as error:
        findings.append(_problem(error))
    if facts["key"] and facts["trusted"] == []:
        findings.append(
            Finding("advice", "no other party is trusted yet", "add its public key: `offsite trust add NAME FILE.pub`")
        )
    return facts, findings


def _problem(error: OffsiteError) -> Finding:
    """A problem out of an error."""
    return Finding("problem", "; ".join([error.what, *error.reasons]), error.next_step or "", error.exit_code)
