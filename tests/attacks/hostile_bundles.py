"""Bundles of a hostile owner: one value of one settings file is changed, and the bundle is signed again.

Each is fed to the commands that touch a bundle. Each command must end with a documented exit code, never with another
exception.
"""

import json
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from artifacts import edit_weights, sign_again
from offsite.cli import main
from offsite.errors import IncompatibleError, OffsiteError, PolicyError, StorageError, UsageError, VerificationError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.contents import ALLOWED_KEYS, CONFIG, GENERATION_CONFIG, PROCESSOR, TOKENIZER_CONFIG
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import Parties

_RAW = object()  # a value that is written as it is: not JSON
CODES = {
    0, *(kind.exit_code for kind in (VerificationError, IncompatibleError, PolicyError, StorageError, UsageError)),
    OffsiteError.exit_code,
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    True, False, -1, 0, 1, 3, 2**21, 4096, 10**12, 10**39, -0.5, 2.0, 1e-300, 1e300, "", "x", "\n\x1b[31mok",
    "9" * 5000, None, [], [[1]], [[[[1]]]], {}, {"a": {"b": 1}}, {"content": 3},
)  # fmt: skip
Place = tuple[str | int, ...]  # the keys that lead to a value


@dataclass(frozen=True)
class Mutation:
    """One change: `value` at `place` in the JSON file `name`; "" of a whole file of weights, see `spoil_weights`."""

    name: str
    place: Place
    value: Any

    def __str__(self) -> str:
        return f"{self.name}:{'.'.join(map(str, self.place))}={str(self.value)[:40]!r}"


def mutations(bundle: Path) -> Iterator[Mutation]:
    """Yield every change of a bundle: each permitted key of each settings file, and each place in tokenizer.json."""
    config = json.loads((bundle / CONFIG).read_text())
    nested = config["model_type"] == "offsite"
    family = ARCHITECTURES[(config["base"] if nested else config)["model_type"]]
    keys = [(CONFIG, ("base", key) if nested else (key,)) for key in sorted(family.config_keys)]
    keys += [(CONFIG, ("emulator", key)) for key in sorted(config.get("emulator", ()))]
    for name in (TOKENIZER_CONFIG, GENERATION_CONFIG, PROCESSOR):
        if (bundle / name).exists():
            keys += [(name, (key,)) for key in sorted(ALLOWED_KEYS[name] or ())]
    rope = (config["base"] if nested else config).get("rope_parameters")
    keys += [(CONFIG, ("rope_parameters", key)) for key in (*(rope or ()), "factor", "rope_type") if not nested]
    if (bundle / "tokenizer.json").exists():
        keys += [("tokenizer.json", place) for place in _places(json.loads((bundle / "tokenizer.json").read_text()))]
    for name, place in keys:
        yield from (Mutation(name, place, value) for value in VALUES)
    if (bundle / WEIGHTS).exists():
        yield from (Mutation(WEIGHTS, (), value) for value in (float("nan"), float("inf"), 3e38))


def _places(content: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the places in tokenizer.json: of long lists and objects, such as the vocabulary, the first entry alone."""
    if place:
        yield place
    items = list(
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, one in items[:1] if len(items) > 20 else items:
        yield from _places(one, (*place, key))


def spoil(bundle: Path, out: Path, mutation: Mutation, parties: Parties) -> Path:
    """Copy a bundle, change it, and sign it again with the owner's key."""
    shutil.copytree(bundle, out)
    if mutation.name == WEIGHTS:
        edit_weights(out / WEIGHTS, lambda arrays: next(iter(arrays.values())).fill(np.float32(mutation.value)))
    else:
        file = out / mutation.name
        content = json.loads(file.read_text())
        inner = content
        for key in mutation.place[:-1]:
            if not isinstance(inner, dict | list) or (isinstance(inner, dict) and key not in inner):
                inner[key] = {}  # type: ignore[index]
            inner = inner[key]
        inner[mutation.place[-1]] = mutation.value
        file.write_text(json.dumps(content))
    sign_again(out, parties.owner.identity())
    return out


def commands(bundle: Path, data: Path, home: Path, out: Path) -> list[list[str]]:
    """The commands of a data owner that touch a bundle, from the one that reads least to the one that reads most."""
    at = ["--home", str(home)]
    quick = ["--max-steps", "1", "--rank", "2"]
    return [
        ["inspect", str(bundle), *at],
        ["verify", str(bundle), *at],
        ["tune", str(bundle), "--data", str(data), "--out", str(out / "planned"), "--plan", *quick, *at],
        ["tune", str(bundle), "--data", str(data), "--out", str(out / "return"), *quick, *at],
        ["eval", str(bundle), "--data", str(data), "--samples", "1", *at],
    ]


def run_all(words: Sequence[Sequence[str]]) -> tuple[list[int], str]:
    """Run the commands in this process, until verification fails; returns their exit codes, and a traceback or ""."""
    codes: list[int] = []
    for one in words:
        try:
            codes.append(main(one))
        except (Exception, SystemExit):  # noqa: BLE001  the subject of the test
            return codes, f"{' '.join(one)}\n{traceback.format_exc()}"
        if one[0] == "verify" and codes[-1]:
            break
    return codes, ""
