"""Held-out accuracy and loss of an image model, each with a 95 % confidence interval over the pictures.

A classifier is scored directly; a bundle is scored with the return that was tuned on it. An encoder alone has no
classes, so a linear probe is scored: logistic regression on its frozen features, fitted on labelled pictures.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from offsite.config import EvalSpec
from offsite.data.data_files import DataPaths
from offsite.data.pictures.picture_files import Floats, Picture, load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.data.read_rows import counted
from offsite.errors import DataError, IncompatibleError, UsageError
from offsite.evaluation.evaluate import load_tuned
from offsite.evaluation.intervals import Interval, interval
from offsite.evaluation.lineage import require_lineage
from offsite.kernels.runtime import Runtime, resolve_runtime, worker_count
from offsite.models.hugging_face_calls import incompatible
from offsite.models.image_encoder import BIAS, WEIGHT, Encoder, encoder_of, is_classifier
from offsite.models.loading import load_classifier
from offsite.models.model_folder import Source, folder_of, model_settings, tensors_of
from offsite.models.torch_tensors import read_tensor
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return, files_of
from offsite.protocol.contents import CLASSIFIER
from offsite.protocol.manifest import ReturnManifest
from offsite.protocol.verify import read_unverified

# penalties on the probe's squared weights; the first is used if there are too few pictures for cross-validation
_PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.3)
_FOLDS = 3  # folds of the cross-validation that chooses the penalty
_PROBE_STEPS = 100  # most iterations of L-BFGS

Logits = Callable[[Floats], torch.Tensor]  # pixels (B, 3, Y, X) -> (B, C) in fp32


@dataclass(frozen=True, slots=True)
class PictureScore:
    """The loss and the predicted class of one picture."""

    line: int  # number of the picture in the data set, from 1
    nats: float  # loss
    right: bool  # whether the predicted class is right
    predicted: str  # name of the predicted class


@dataclass(frozen=True)
class ImageScore:
    """The result of `evaluate_images`: accuracy, loss in nats per picture, and the size of the data set."""

    accuracy: float
    loss: float
    rows: int
    classes: int
    skipped: int
    seconds: float
    images_per_s: float
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    pictures: Sequence[PictureScore] = field(default=(), repr=False)


def evaluate_images(
    model: Path | Base | Bundle | PlugIn,
    data: DataPaths,
    spec: EvalSpec,
    *,
    adapter: Path | Return | PlugIn | None = None,
    probe: Path | None = None,
    progress: Progress = silent,
) -> ImageScore:
    """Score an image model on labelled pictures.

    Args:
        model: a classifier (a merged plug-in), or an encoder (a base, a bundle).
        data: pictures, as `read_pictures` of `offsite.data.pictures.picture_sets` reads them. If the folder has parts
            (splits), its held-out part is used.
        spec: the settings of the evaluation: device, compute dtype, and how many pictures run at once.
        adapter: for a bundle, the return that was tuned on it, with its classifier; otherwise None.
        probe: for an encoder without an adapter, pictures to fit a linear probe on; otherwise None. If the folder has
            parts, its training part is used.
        progress: receives the progress events.

    Raises:
        DataError: pictures cannot be read, or have classes that the model does not know.
        UsageError: an encoder has neither an adapter nor a probe, or has both; or a classifier has one of them.
        StorageError: a file is missing or broken.
        IncompatibleError: the folder is not a plain checkpoint, or the adapter does not fit it.
    """
    require_lineage(model, adapter)
    if isinstance(adapter, PlugIn):
        raise IncompatibleError(
            f"the plug-in {adapter.folder} is an adapter of a language model, and {files_of(model)} sees images",
            next_step="name a return as the adapter, or a complete plug-in as the model",
        )
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    workers = PictureWorkers(worker_count(spec.workers, runtime.device))
    with workers, incompatible(folder_of(files_of(model)), "run"):
        return _evaluate(model, data, spec, adapter, probe, runtime, workers, progress)


def _evaluate(
    model: Path | Base | Bundle | PlugIn,
    data: DataPaths,
    spec: EvalSpec,
    adapter: Path | Return | None,
    probe: Path | None,
    runtime: Runtime,
    workers: PictureWorkers,
    progress: Progress,
) -> ImageScore:
    """Score an image model; arguments as for `evaluate_images`, with the runtime and open worker processes."""
    if adapter is not None and probe is not None:
        raise UsageError("an adapter and a probe were both given", next_step="give one of --adapter and --probe")
    source = files_of(model)
    classifies = is_classifier(model_settings(source))
    if classifies and (adapter is not None or probe is not None):
        raise UsageError(
            f"{folder_of(source)} already has a classifier, so --adapter and --probe do not apply",
            next_step="leave --adapter and --probe out, or name the bundle or base that they are for",
        )
    processor = load_processor(source)
    listed = read_pictures(data, part="held out", columns=spec.columns)[: spec.max_rows]
    pictures = Pictures(listed, processor, skip_bad=spec.skip_bad, workers=workers)
    if classifies:
        logits, classes = _logits_of_classifier(source, runtime)
    elif adapter is not None:
        logits, classes = _logits_of_return(source, adapter, runtime)
    elif probe is not None:
        fitted_on = Pictures(
            read_pictures(probe, part="train", columns=spec.columns), processor, skip_bad=spec.skip_bad, workers=workers
        )
        encoder = encoder_of(load_tuned(source, None, runtime))
        logits, classes = _logits_of_probe(encoder, fitted_on, spec.micro_batch_images, progress)
    else:
        raise UsageError(
            f"{folder_of(source)} is an encoder without a classifier",
            next_step="name a return with --adapter, or pictures to fit a linear probe on with --probe",
        )
    labels = _class_indices(pictures.pictures, classes)
    started = time.perf_counter()
    nats, predicted = _score(logits, pictures, labels, spec.micro_batch_images, progress)
    seconds = time.perf_counter() - started
    right = [float(found == label) for found, label in zip(predicted, labels.tolist(), strict=True)]
    ends = {"accuracy": interval(right), "loss": interval(nats)}
    places = {picture.name: number for number, picture in enumerate(listed, start=1)}
    return ImageScore(
        accuracy=sum(right) / len(right),
        loss=sum(nats) / len(nats),
        rows=len(pictures),
        classes=len(classes),
        skipped=len(pictures.skipped),
        seconds=round(seconds, 3),
        images_per_s=round(len(pictures) / seconds, 1),
        intervals={name: found for name, found in ends.items() if found},
        pictures=[
            PictureScore(places[picture.name], loss, bool(hit), classes[index])
            for picture, loss, hit, index in zip(pictures.pictures, nats, right, predicted, strict=True)
        ],
    )


def _class_indices(pictures: list[Picture], classes: tuple[str, ...]) -> torch.Tensor:
    """The index of each picture's class in `classes`, (N,).

    Raises:
        DataError: a picture has a class that is not in `classes`.
    """
    place = {name: index for index, name in enumerate(classes)}
    unknown = sorted({picture.label or "" for picture in pictures} - set(place))
    if unknown:
        raise DataError(
            "the pictures have classes that the model does not know",
            reasons=[f"found {', '.join(unknown)[:200]}", f"expected {', '.join(classes)[:200]}"],
            next_step="score the model on pictures of the classes that it was tuned on",
        )
    return torch.tensor([place[picture.label or ""] for picture in pictures])


@torch.no_grad()
def _score(
    logits: Logits, pictures: Pictures, labels: torch.Tensor, size: int, progress: Progress
) -> tuple[list[float], list[int]]:
    """Run the model on pictures; returns the loss of each in nats, and the index of its predicted class.

    Args:
        logits: the model, as a function from pixels (B, 3, Y, X) to logits (B, C).
        pictures: the N pictures.
        labels: the index of each picture's right class, (N,).
        size: the number of pictures that run at once.
        progress: receives the progress events.
    """
    nats: list[float] = []
    predicted: list[int] = []
    right = 0
    for rows, pixels in pictures.in_order(size):
        found = logits(pixels).float().cpu()
        targets = labels[list(rows)]
        nats += F.cross_entropy(found, targets, reduction="none").tolist()
        predicted += found.argmax(dim=1).tolist()
        right += int((found.argmax(dim=1) == targets).sum())
        progress(Event("evaluating", len(nats), len(pictures), {"accuracy": right / len(predicted)}))
    return nats, predicted


def _logits_of_classifier(source: Source, runtime: Runtime) -> tuple[Logits, tuple[str, ...]]:
    """Load a classifier; returns the function from pixels to its logits, and the names of its classes."""
    loaded = load_classifier(source, dtype=runtime.dtype, device=runtime.device)
    names = tuple(str(loaded.config.id2label[index]) for index in range(loaded.config.num_labels))

    def logits(pixels: Floats) -> torch.Tensor:
        found: torch.Tensor = loaded(pixel_values=torch.from_numpy(pixels).to(runtime.device, runtime.dtype)).logits
        return found

    return logits, names


def _logits_of_return(model: Source, returned: Path | Return, runtime: Runtime) -> tuple[Logits, tuple[str, ...]]:
    """Load an encoder with a return; returns the function from pixels to logits, and the names of the classes."""
    manifest = returned.manifest if isinstance(returned, Return) else read_unverified(returned)
    source = files_of(returned)
    classes = manifest.classes if isinstance(manifest, ReturnManifest) else None
    if classes is None:
        raise IncompatibleError(
            f"{folder_of(source)} has no classifier",
            next_step="name a return that was tuned on pictures with --adapter",
        )
    encoder = encoder_of(load_tuned(model, source, runtime))
    head = {name: read_tensor(tensor).to(runtime.device) for name, tensor in tensors_of(source, CLASSIFIER).items()}
    found, expected = {name: tuple(tensor.shape) for name, tensor in head.items()}, (len(classes), encoder.inputs)
    if found != {WEIGHT: expected, BIAS: expected[:1]}:
        raise IncompatibleError(
            f"the classifier in {folder_of(source)} does not fit the encoder {folder_of(model)}",
            reasons=[f"found {found}, expected a weight of {expected} and a bias"],
            next_step="name the bundle that it was tuned on",
        )
    return lambda pixels: F.linear(encoder.features(pixels), head[WEIGHT], head[BIAS]), classes


def _logits_of_probe(
    encoder: Encoder, pictures: Pictures, size: int, progress: Progress
) -> tuple[Logits, tuple[str, ...]]:
    """Fit a linear probe on an encoder; returns the function from pixels to logits, and the names of the classes."""
    classes = tuple(sorted({picture.label or "" for picture in pictures.pictures}))
    if len(classes) < 2:
        raise DataError(
            "a probe needs pictures of at least two classes",
            reasons=[f"found {counted(pictures.pictures, 'picture')} of {classes[0][:200]}"],
            next_step="name other pictures with --probe",
        )
    labels = _class_indices(pictures.pictures, classes).to(encoder.device)
    weight, bias = fit_probe(probe_features(encoder, pictures, size, progress), labels, len(classes))
    return lambda pixels: F.linear(encoder.features(pixels), weight, bias), classes


@torch.no_grad()
def probe_features(encoder: Encoder, pictures: Pictures, size: int, progress: Progress) -> torch.Tensor:
    """Compute the encoder's features for each picture, (N, F), which the probe reads; `size` pictures run at once."""
    made = []
    for rows, pixels in pictures.in_order(size):
        made.append(encoder.features(pixels))
        progress(Event("features for the probe", rows[-1] + 1, len(pictures)))
    return torch.cat(made)


def fit_probe(
    features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a linear probe: logistic regression with an L2 penalty, started at zero. It uses no random numbers.

    The penalty applies to the weights of standardised features; the returned weights are for the features as they are.
    Few pictures need a strong penalty and many pictures a weak one, so cross-validation on the same pictures chooses
    it.

    Args:
        features: (N, F), fp32.
        labels: the index of each picture's class, (N,).
        classes: the number C of classes.
        penalty: the factor of the sum of squared weights in the mean loss; with None cross-validation chooses it.

    Returns:
        Weight (C, F) and bias (C,).
    """
    return _fit_logistic_regression(
        features, labels, classes, _choose_penalty(features, labels, classes) if penalty is None else penalty
    )


def _choose_penalty(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Choose the penalty with the lowest loss in cross-validation; arguments as for `fit_probe`."""
    count = len(labels)
    if count < 2 * _FOLDS:
        return _PENALTIES[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(features.device)
    losses = []
    for penalty in _PENALTIES:
        nats = 0.0
        for fold in range(_FOLDS):
            out = torch.zeros(count, dtype=torch.bool, device=features.device)
            out[order[fold::_FOLDS]] = True
            weight, bias = _fit_logistic_regression(features[~out], labels[~out], classes, penalty)
            nats += float(F.cross_entropy(F.linear(features[out], weight, bias), labels[out], reduction="sum"))
        losses.append(nats)
    return _PENALTIES[losses.index(min(losses))]


@torch.enable_grad()
def _fit_logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit weight (C, F) and bias (C,) with a fixed penalty; arguments as for `fit_probe`."""
    mean, spread = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
    standard = (features - mean) / spread
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(standard, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    scaled = weight.detach() / spread
    return scaled, bias.detach() - scaled @ mean
