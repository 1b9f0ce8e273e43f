"""What the audit for traps found: one value for each finding, and the result of the audit."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

RuleName = Literal[
    "not finite", "extreme weight", "row norm", "vector", "single input", "duplicate rows", "dead rows", "low rank",
    "embedding norm", "silent features", "selective rows",
]  # fmt: skip
_SHOWN = 8  # most rows and tokens that a finding lists
_LISTED = 3  # most findings in a line
_SENTENCES: dict[RuleName, str] = {
    "not finite": "{count} values are NaN or infinite",
    "extreme weight": "the largest weight is {value:.3g} times the median, at most {limit:.3g} is usual",
    "row norm": "{count} rows have up to {value:.3g} times the median norm, at most {limit:.3g} is usual",
    "vector": "{count} values are up to {value:.3g} times the median, at most {limit:.3g} is usual",
    "single input": "{count} rows read one input only",
    "duplicate rows": "{count} rows equal another one up to a factor",
    "dead rows": "{count} rows are zero, {limit:.3g} in other blocks",
    "low rank": "the effective rank is {value:.2f}, {limit:.2f} in other blocks",
    "embedding norm": "{count} tokens have up to {value:.3g} times the median norm, at most {limit:.3g} is usual",
    "silent features": "{count} features are silent for almost all tokens, so each tells whether a few tokens occurred",
    "selective rows": "{count} rows answer to one token {value:.3g} times as much as to any other",
}


@dataclass(frozen=True)
class Finding:
    """One rule's finding about one tensor of a trained block, or about the embeddings."""

    rule: RuleName
    place: str  # the tensor, such as "block 0, mlp.gate_proj"
    count: int  # number of rows, features or values that stand out
    value: float  # that of the farthest one
    limit: float  # what the rule permits here
    rows: tuple[int, ...] = ()  # indices of the first of them
    tokens: tuple[int, ...] = ()  # ids of the tokens to which these rows answer, where the rule knows them

    @property
    def sentence(self) -> str:
        """The finding in words."""
        words = _SENTENCES[self.rule].format(count=self.count, value=self.value, limit=self.limit)
        named = f" (token ids {', '.join(map(str, self.tokens))})" if self.tokens else ""
        return f"{self.place}: {words}{named}"


def finding(
    rule: RuleName, place: str, rows: list[int], value: float, limit: float, tokens: list[int] | None = None
) -> Finding:
    """A finding about these rows; it lists the first eight."""
    return Finding(rule, place, len(rows), value, limit, tuple(rows[:_SHOWN]), tuple((tokens or [])[:_SHOWN]))


@dataclass(frozen=True)
class TrapAudit:
    """The result of an audit."""

    findings: tuple[Finding, ...]
    blocks: tuple[int, ...]  # indices of the trained blocks that were audited
    matrices: int  # number of matrices that were read
    inputs: int  # number of tokens, or pictures, that were run through the blocks
    quick: bool
    seed: int  # of the choice of tokens
    seconds: float

    @property
    def suspicious(self) -> bool:
        """Whether anything was found."""
        return bool(self.findings)

    def in_words(self) -> str:
        """The result in one line, which begins with "traps: "."""
        how = "the quick audit" if self.quick else "the audit"
        if not self.findings:
            return f"traps: {how} found nothing in {len(self.blocks)} trained blocks"
        listed = "; ".join(one.sentence for one in self.findings[:_LISTED])
        more = f"; and {len(self.findings) - _LISTED} more" if len(self.findings) > _LISTED else ""
        return f"traps: {how} found {len(self.findings)} signs of a trap for your rows: {listed}{more}"

    def to_json(self) -> dict[str, Any]:
        """The result as values that JSON can hold."""
        return {
            **asdict(self),
            "suspicious": self.suspicious,
            "findings": [{**asdict(one), "sentence": one.sentence} for one in self.findings],
        }
