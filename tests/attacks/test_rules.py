"""Every rule of verify has an attack that it alone stops: with the rule the attack is refused, without it it passes."""

import pytest

from attacks.catalogue import ATTACKS, Attack
from attacks.lab import Lab
from offsite.errors import VerificationError
from offsite.protocol import verify as module

RULES = [
    (table, rule.__name__)
    for table in ("SIGNER_RULES", "LISTING_RULES", "FILE_RULES", "BUNDLE_RULES", "RETURN_RULES")
    for rule in getattr(module, table)
]


def names(attack: Attack) -> str:
    return f"{attack.rule}-{attack.name}"


@pytest.mark.parametrize(
    "target",
    [
        *("bundle", "gpt2-bundle", "declared-bundle", "mixture-bundle", "encoder-bundle", "timm-bundle", "head-bundle"),
        "narrow-mixture-bundle",
        *("every-bundle", "every-gpt2-bundle", "every-lora", "every-bitfit"),
        *("lora", "full", "bitfit", "bottleneck", "checkpoints", "encoder-full", "head-lora", "head-full"),
    ],
)
def test_the_honest_exchange_passes(lab: Lab, target: str) -> None:
    assert lab.check(target).folder == lab.folder / target


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_attack_is_refused_for_its_reason(lab: Lab, attack: Attack) -> None:
    attack.spoil(lab)
    with pytest.raises(VerificationError) as caught:
        lab.check(attack.target)
    assert any(attack.says in reason for reason in caught.value.reasons), caught.value.reasons
    assert caught.value.exit_code == 3
    assert caught.value.next_step


@pytest.mark.parametrize("attack", ATTACKS, ids=names)
def test_attack_passes_where_its_rule_is_taken_out(lab: Lab, attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    attack.spoil(lab)
    table = next(table for table, rule in RULES if rule == attack.rule)
    left = tuple(rule for rule in getattr(module, table) if rule.__name__ != attack.rule)
    monkeypatch.setattr(module, table, left)
    lab.check(attack.target)  # so nothing else would have caught it


@pytest.mark.parametrize("rule", [rule for _, rule in RULES])
def test_every_rule_has_an_attack(rule: str) -> None:
    assert any(attack.rule == rule for attack in ATTACKS), f"no attack in catalogue.py is stopped by {rule} alone"


def test_every_attack_names_a_rule() -> None:
    assert {attack.rule for attack in ATTACKS} <= {rule for _, rule in RULES}
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
