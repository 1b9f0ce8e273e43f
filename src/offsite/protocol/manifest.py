"""The schema of `offsite.json` for each kind of artifact: strict types that refuse unknown fields."""

import itertools
import operator
import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from offsite.config import Method, describe_validation
from offsite.models.families.architectures import ARCHITECTURES, Architecture
from offsite.models.families.declared_family import DeclaredFamily, declared_architecture
from offsite.models.families.transformers_types import causal_class
from offsite.models.modules.declared import FEATURES
from offsite.models.modules.declared_shapes import bottleneck_places, bottleneck_shapes
from offsite.storage.strict_json import strict_json

MANIFEST = "offsite.json"
SIGNATURE = "offsite.json.sig"
MANIFEST_BYTES = 16 * 2**20  # no manifest is larger
_MOST_ENTRIES = 500_000  # most entries of all lists and objects in a manifest together
_MOST_KEYS = 64  # most keys of an object whose keys are fields, not names of tensors
FORMAT: Final = 1
FAMILY = "family"  # a reader must support a family that the manifest declares
SPREAD = "spread"  # the feature of bundles with trained blocks inside the emulator; `requires` lists it
ADAPTED = "adapted"  # the feature of bundles with adapters on compressed blocks; `requires` lists it
# features that this version understands beyond the format itself
KNOWN_REQUIREMENTS: frozenset[str] = frozenset((*FEATURES, SPREAD, ADAPTED, FAMILY))

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Feature = Annotated[str, Field(pattern=r"^[a-z0-9_.-]{1,64}$")]
Size = Annotated[int, Field(ge=0, lt=2**56)]
ClassName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,128}$")]
Score = Annotated[float, Field(ge=0)]  # nats per labelled token


class _Part(BaseModel):
    """Base class of the parts of a manifest: frozen, strict, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the artifact: its name in the folder, its size in bytes, and its SHA-256 in hex."""

    name: FileName
    size: Size
    sha256: Digest


class TensorEntry(_Part):
    """The shape and dtype of a tensor, as a manifest lists them."""

    shape: Annotated[tuple[Size, ...], Field(max_length=8, strict=False)]
    dtype: Literal["F32", "BF16", "F16"]


class Split(_Part):
    """The numbers of blocks in each part of the bundle: trained first blocks, emulator, trained last blocks.

    `emulator` counts all blocks between bottom and top. They are compressed and frozen, with two exceptions, listed by
    their indices in the bundle: `spread` blocks are not compressed and train like bottom and top; `adapted` blocks are
    compressed, and adapters on them may train.
    """

    bottom: Annotated[int, Field(ge=0, le=10_000)]
    emulator: Annotated[int, Field(ge=0, le=10_000)]
    top: Annotated[int, Field(ge=0, le=10_000)]
    spread: Annotated[tuple[int, ...], Field(max_length=10_000, strict=False, exclude_if=operator.not_)] = ()
    adapted: Annotated[tuple[int, ...], Field(max_length=10_000, strict=False, exclude_if=operator.not_)] = ()

    @model_validator(mode="after")
    def _inside(self) -> "Split":
        """Validator: `spread` and `adapted` list blocks of the emulator in ascending order, none in both."""
        # the emulator's first and last block are frozen, as trained ones would count to bottom and top
        inner = range(self.bottom + 1, self.bottom + self.emulator - 1)
        if any(place not in inner for place in self.spread):
            raise ValueError("spread lists blocks that are not inside the emulator")
        if any(after <= before for before, after in itertools.pairwise(self.spread)):
            raise ValueError("spread is not in ascending order")
        if not set(self.adapted) <= set(range(self.bottom, self.bottom + self.emulator)) - set(self.spread):
            raise ValueError("adapted lists blocks that are not compressed blocks of the emulator")
        if any(after <= before for before, after in itertools.pairwise(self.adapted)):
            raise ValueError("adapted is not in ascending order")
        return self

    @property
    def blocks(self) -> int:
        """The number of all blocks of the bundle."""
        return self.bottom + self.emulator + self.top

    @property
    def verbatim(self) -> tuple[int, ...]:
        """The indices of the blocks that are unchanged from the base, in ascending order; all of them may train."""
        return (*range(self.bottom), *self.spread, *range(self.bottom + self.emulator, self.blocks))

    @property
    def trained(self) -> tuple[int, ...]:
        """The indices of the blocks that may get trained weights or adapters, in ascending order."""
        return tuple(sorted((*self.verbatim, *self.adapted)))

    @property
    def features(self) -> tuple[str, ...]:
        """The features that a reader must support for this split, as the manifest's `requires` lists them."""
        return (*((SPREAD,) if self.spread else ()), *((ADAPTED,) if self.adapted else ()))


class _Document(_Part):
    """Base class of all manifests: the version of the format, the required features and the list of files."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]  # not Literal[1], which would accept true
    requires: Annotated[tuple[Feature, ...], Field(max_length=64, strict=False)]
    files: Annotated[tuple[FileEntry, ...], Field(max_length=10_000, strict=False)]

    @model_validator(mode="after")
    def _understood(self) -> "_Document":
        """Validator: this version supports all required features, and no file is listed twice."""
        unknown = sorted(set(self.requires) - KNOWN_REQUIREMENTS)
        if unknown:
            raise ValueError(f"requires {', '.join(unknown)[:200]}, which this version does not know; update offsite")
        names = [entry.name.lower() for entry in self.files]
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        return self


class BundleManifest(_Document):
    """The manifest of a bundle: its parts, and what a return may contain.

    It does not say which of the base's blocks were kept; shapes are those of the bundle. If adapters on compressed
    blocks may train, `tensors` lists only the biases of the trained blocks, since no whole block may be returned.
    """

    kind: Literal["bundle"]
    issued_at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    issuer: Digest
    recipient: Digest
    base: Digest
    tokenizer: Digest
    architecture: str
    split: Split
    methods: Annotated[tuple[Method, ...], Field(min_length=1, strict=False)]
    max_rank: Annotated[int, Field(ge=1, le=65_536)]
    max_width: Annotated[int, Field(ge=1, le=65_536)]
    tensors: dict[TensorName, TensorEntry]
    lora_targets: dict[TensorName, Annotated[tuple[Size, Size], Field(strict=False)]]
    head: dict[TensorName, TensorEntry] = {}  # the head's tensors that a return may contain
    # the row of a family that the table does not have
    declared_family: Annotated[DeclaredFamily | None, Field(exclude_if=lambda row: row is None)] = None

    @model_validator(mode="after")
    def _consistent(self) -> "BundleManifest":
        """Validator: everything that may be returned belongs to a trained block or to the head."""
        self._require_family()
        family = self.family
        trained = frozenset(self.split.trained)
        if not self.tensors and not (self.split.adapted and self.lora_targets):
            raise ValueError("tensors and lora_targets list nothing that may come back")
        if self.split.adapted and ("full" in self.methods or not all(map(family.is_bias, self.tensors))):
            raise ValueError(
                "adapters sit on compressed blocks, of which only biases may come back, and no whole block"
            )
        for name in (*self.tensors, *self.lora_targets):
            place = family.linear_layer_of(name) if name in self.lora_targets else family.block_of(name)
            if place is None or place[0] not in trained:
                raise ValueError(f"{name} belongs to no trained block, so it may not come back")
        for name in self.head:
            if not family.head or name not in (family.head, f"{family.head.removesuffix('.weight')}.bias"):
                raise ValueError(f"{name} is no part of the head of {self.architecture}, so it may not come back")
        places = {name: family.linear_layer_of(name) for name in self.lora_targets}
        strange = sorted(name for name, place in places.items() if place is None or place[1] not in family.lora_linears)
        if strange:
            raise ValueError(
                f"LoRA targets that are not linear layers of {self.architecture} for it: {', '.join(strange[:4])}"
            )
        return self

    @property
    def family(self) -> Architecture:
        """The family of the bundle's model: from the table, or declared in this manifest."""
        if self.declared_family is None:
            return ARCHITECTURES[self.architecture]
        return declared_architecture(self.declared_family, self.architecture)

    @property
    def features(self) -> tuple[str, ...]:
        """Features that a reader must support for the split and the family; `requires` also has the emulator's."""
        return (*self.split.features, *((FAMILY,) if self.declared_family is not None else ()))

    def _require_family(self) -> None:
        """Raise ValueError if the family of the model is neither in the table nor declared, or is declared wrongly."""
        row, kind = self.declared_family, self.architecture
        if row is None:
            if kind not in ARCHITECTURES:
                raise ValueError(f"architecture {kind[:64]!r} is not known to this version; update offsite")
            return
        if kind in ARCHITECTURES:
            raise ValueError(f"a family is declared for architecture {kind[:64]!r}, which has a row of its own")
        if causal_class(kind) is None:
            raise ValueError(
                f"architecture {kind[:64]!r} is no causal language model of the installed transformers; update it"
            )
        if len(row.layout_of) != self.split.blocks:
            raise ValueError(f"a family of {len(row.layout_of)} blocks is declared, the split has {self.split.blocks}")

    @property
    def hidden(self) -> int:
        """The model's hidden size, from the output projection of attention in the first trained block."""
        family = self.family
        first = self.split.trained[0]
        place = family.in_block(first, family.outputs_of(first)[0])
        if weight := self.tensors.get(f"{place}.weight"):
            return weight.shape[1 if family.transposed else 0]
        return self.lora_targets[family.module_of(place)][1]

    def own_tensors(self, method: Method) -> dict[str, TensorEntry]:
        """The base's tensors that this method trains and returns; empty if it adds tensors (LoRA, bottleneck)."""
        family = self.family
        if method == "bitfit":
            return {name: entry for name, entry in self.tensors.items() if family.is_bias(name)}
        return dict(self.tensors) if method == "full" and not self.split.adapted else {}


class BottleneckSettings(_Part):
    """The width of the bottlenecks in a return; each trained block has one after attention and one after the MLP."""

    width: Annotated[int, Field(ge=1, le=65_536)]

    def tensors(self, bundle: BundleManifest) -> dict[str, TensorEntry]:
        """The shape and dtype, by name, of the tensors of these bottlenecks in a return to `bundle`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for place in bottleneck_places(bundle.family, bundle.split.trained):
            shapes |= bottleneck_shapes(place, bundle.hidden, self.width)
        return {name: TensorEntry(shape=shape, dtype="F32") for name, shape in shapes.items()}


class LoraSettings(_Part):
    """The LoRA settings of a return: rank, alpha (scale = alpha / rank), and the full module paths of its targets."""

    rank: Annotated[int, Field(ge=1, le=65_536)]
    alpha: Annotated[float, Field(gt=0, lt=1e6)]
    targets: Annotated[tuple[TensorName, ...], Field(min_length=1, max_length=100_000, strict=False)]


class ReturnManifest(_Document):
    """The manifest of a return: the digest of its bundle, how it was tuned, and every tensor in it.

    It says nothing about the data, with two exceptions: `scores`, the held-out loss of each checkpoint, if the data
    owner chose to report it; and `classes` for images, the class names in the order of the classifier's outputs.
    """

    kind: Literal["return"]
    bundle: Digest
    signer: Digest
    recipient: Digest
    method: Method
    lora: LoraSettings | None  # None unless `method` is "lora"
    bottleneck: BottleneckSettings | None = None  # None unless `method` is "bottleneck"
    head: bool = False  # whether the model's head was tuned too, and `tensors` includes it
    earlier_checkpoints: Annotated[int, Field(ge=0, lt=100)] = 0  # checkpoints before the last, with the same tensors
    scores: Annotated[tuple[Score, ...], Field(min_length=1, max_length=100, strict=False)] | None = None
    tensors: Annotated[dict[TensorName, TensorEntry], Field(min_length=1)]
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2, max_length=100_000, strict=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ReturnManifest":
        """Validator: the settings fit the method, and there is one score for each checkpoint."""
        _require_nothing(self)
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        if self.scores is not None and len(self.scores) != self.checkpoints:
            raise ValueError(f"{len(self.scores)} scores of {self.checkpoints} checkpoints")
        if (self.method == "lora") != (self.lora is not None):
            raise ValueError("lora settings are required by method 'lora', and permitted for no other")
        if (self.method == "bottleneck") != (self.bottleneck is not None):
            raise ValueError("bottleneck settings are required by method 'bottleneck', and permitted for no other")
        if self.head and self.method == "bottleneck":
            raise ValueError("a head is permitted only with the methods 'lora', 'full' and 'bitfit'")
        return self

    @property
    def checkpoints(self) -> int:
        """The number of all checkpoints, the last one included."""
        return self.earlier_checkpoints + 1


class PlugInManifest(_Document):
    """The manifest of a plug-in: its form, its strength, and the digests of its base, bundle and return."""

    kind: Literal["plug-in"]
    form: Literal["adapter", "merged"]
    architecture: str
    base: Digest
    bundle: Digest
    returned: Digest
    strength: Annotated[float, Field(ge=0, le=1.5)] = 1.0
    checkpoint: Annotated[int, Field(ge=1, le=100)] = 1  # the number of the return's checkpoint, from 1
    issuer: Digest

    @model_validator(mode="after")
    def _consistent(self) -> "PlugInManifest":
        """Validator: no feature is required."""
        _require_nothing(self)
        return self


def _require_nothing(document: _Document) -> None:
    """Raise ValueError if a return or plug-in requires a feature, since only bundles have features."""
    if document.requires:
        raise ValueError("requires features that only a bundle can require")


Manifest = BundleManifest | ReturnManifest | PlugInManifest
_ANY: TypeAdapter[Manifest] = TypeAdapter(Annotated[Manifest, Field(discriminator="kind")])


class ManifestProblem(ValueError):  # noqa: N818  a finding that verify turns into an error
    """An `offsite.json` is malformed or not supported; `reasons` lists every problem."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def parse_manifest(raw: bytes) -> Manifest:
    """Parse the bytes of an `offsite.json`.

    Raises:
        ManifestProblem: it is not JSON, has an unknown kind, format or requirement, or unknown or malformed fields.
    """
    if len(raw) > MANIFEST_BYTES:
        raise ManifestProblem([f"{MANIFEST} has {len(raw)} bytes, expected at most {MANIFEST_BYTES}"])
    try:
        content = strict_json(raw)
    except ValueError as error:
        raise ManifestProblem([f"{MANIFEST} is not JSON: {error}"]) from None
    if _is_out_of_proportion(content):
        raise ManifestProblem([f"{MANIFEST} has more entries, or more of them in one place, than any manifest"])
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise ManifestProblem(
            [f"{MANIFEST} has format {content['format']}, this version reads up to {FORMAT}: update offsite"]
        )
    try:
        return _ANY.validate_python(content)
    except ValidationError as error:
        reasons = [re.sub(r"^(bundle|return|plug-in)\.", "", reason) for reason in describe_validation(error)]
        raise ManifestProblem([f"{MANIFEST}: {reason}" for reason in reasons]) from None


def _is_out_of_proportion(content: object) -> bool:
    """Whether parsed JSON has more entries than any manifest, since validation could report an error for each."""
    left, within = _MOST_ENTRIES, [(content, 0)]
    while within:
        one, depth = within.pop()
        parts = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        left -= len(parts)
        if left < 0 or (isinstance(one, dict) and depth != 1 and len(one) > _MOST_KEYS):
            return True
        within += [(part, depth + 1) for part in parts]
    return False


def render_manifest(manifest: Manifest) -> bytes:
    """Make the bytes of `offsite.json` for a manifest; these bytes are signed, so no canonical form is needed."""
    return manifest.model_dump_json(indent=1).encode() + b"\n"
