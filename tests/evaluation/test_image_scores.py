from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from artifacts import full_return, packed
from offsite.config import EvalSpec
from offsite.errors import DataError, IncompatibleError, UsageError
from offsite.evaluation.image_scores import evaluate_images, fit_probe
from tiny import tiny_base, tiny_parties, tiny_pictures, tiny_vision_base

EXACT = EvalSpec(compute="fp32", device="cpu", threads=1, micro_batch_images=5)


def test_a_linear_probe_tells_colours_apart(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "dinov2", 2)
    train, test = tiny_pictures(tmp_path / "train", 12), tiny_pictures(tmp_path / "test", 4, seed=1)
    score = evaluate_images(base, test, EXACT, probe=train)
    assert score.accuracy > 0.8
    assert (score.rows, score.classes, score.skipped) == (12, 3, 0)
    assert score.intervals["accuracy"].low <= score.accuracy <= score.intervals["accuracy"].high
    assert score.intervals["loss"].low <= score.loss <= score.intervals["loss"].high
    assert [one.line for one in score.pictures] == list(range(1, 13))
    assert sum(one.right for one in score.pictures) == pytest.approx(12 * score.accuracy)
    assert sum(one.nats for one in score.pictures) == pytest.approx(12 * score.loss)
    colours = [colour for colour in ("blue", "green", "red") for _ in range(4)]  # as a folder is listed
    assert [one.predicted == colour for one, colour in zip(score.pictures, colours, strict=True)] == [
        one.right for one in score.pictures
    ]
    again = evaluate_images(base, test, EvalSpec(compute="fp32", device="cpu", threads=1, max_rows=4), probe=train)
    assert again.rows == 4


def test_the_owners_own_classifier_is_scored_as_it_is(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "vit", 2, classifier=True)
    pictures, colours = tmp_path / "pictures", tiny_pictures(tmp_path / "colours", 2)
    pictures.mkdir()
    for name, colour in (("SECRET-one", "red"), ("SECRET-two", "blue")):
        (colours / colour).rename(pictures / name)
    score = evaluate_images(base, pictures, EXACT)
    assert (score.rows, score.classes) == (4, 3)
    with pytest.raises(DataError, match="model does not know"):
        evaluate_images(base, tiny_pictures(tmp_path / "others", 1), EXACT)
    for beside in ({"adapter": tmp_path / "none"}, {"probe": tmp_path / "none"}):
        with pytest.raises(UsageError, match="already has a classifier"):
            evaluate_images(base, pictures, EXACT, **beside)


def test_an_encoder_alone_tells_no_classes(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "vit", 2)
    pictures = tiny_pictures(tmp_path / "pictures", 1)
    with pytest.raises(UsageError, match="without a classifier"):
        evaluate_images(base, pictures, EXACT)
    with pytest.raises(UsageError, match="both given"):
        evaluate_images(base, pictures, EXACT, adapter=tmp_path / "return", probe=pictures)


def test_a_probe_of_one_class_is_refused(tmp_path: Path) -> None:
    base, pictures = tiny_vision_base(tmp_path / "base", "vit", 2), tiny_pictures(tmp_path / "pictures", 1)
    (tmp_path / "one").mkdir()
    (pictures / "red").rename(tmp_path / "one" / "red")
    with pytest.raises(DataError, match="at least two classes") as caught:
        evaluate_images(base, pictures, EXACT, probe=tmp_path / "one")
    assert caught.value.reasons == ("found 1 picture of red",)


def test_a_return_for_another_encoder(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    pictures = tiny_pictures(tmp_path / "pictures", 1)
    bundle = packed(tiny_vision_base(tmp_path / "base", "dinov2", 3), tmp_path / "bundle", parties)
    classes = ("blue", "green", "red")
    full_return(bundle, tmp_path / "return", parties.data_owner, classes=classes)
    assert evaluate_images(bundle.folder, pictures, EXACT, adapter=tmp_path / "return").rows == 3
    other = packed(tiny_vision_base(tmp_path / "other", "vit", 3), tmp_path / "other-bundle", parties)
    with pytest.raises(IncompatibleError):
        evaluate_images(other.folder, pictures, EXACT, adapter=tmp_path / "return")
    text = packed(tiny_base(tmp_path / "text", blocks=3), tmp_path / "text-bundle", parties)
    full_return(text, tmp_path / "text-return", parties.data_owner)
    with pytest.raises(IncompatibleError, match="has no classifier"):
        evaluate_images(bundle.folder, pictures, EXACT, adapter=tmp_path / "text-return")


def test_the_probe_is_at_the_minimum_of_its_loss() -> None:
    """That of standardised features; what comes back is for the features as they are."""
    draw = torch.Generator().manual_seed(0)
    features, wanted = 3 * torch.randn(60, 8, generator=draw) + 5, torch.arange(60) % 3
    weight, bias = fit_probe(features, wanted, 3, 1e-2)
    mean, spread = features.mean(dim=0), features.std(dim=0)
    inner = (weight * spread).requires_grad_(True)
    logits = F.linear((features - mean) / spread, inner, bias + weight @ mean)
    torch.testing.assert_close(logits.detach(), F.linear(features, weight, bias), rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits, wanted) + 1e-2 * inner.square().sum()
    (slope,) = torch.autograd.grad(loss, inner)
    assert float(slope.abs().max()) < 1e-3


def test_the_penalty_is_chosen_on_pictures_that_the_probe_has_not_seen() -> None:
    """Features that say nothing want a strong one, features that tell the classes apart a weak one."""
    draw = torch.Generator().manual_seed(0)
    wanted = torch.arange(60) % 3
    noise = torch.randn(60, 30, generator=draw)
    telling = torch.cat([10 * F.one_hot(wanted, 3).float(), 0.1 * noise], dim=1)
    for features, penalty in ((noise, 0.3), (telling, 0.003)):
        chosen, expected = fit_probe(features, wanted, 3), fit_probe(features, wanted, 3, penalty)
        assert all(torch.equal(one, other) for one, other in zip(chosen, expected, strict=True))
    few = fit_probe(noise[:5], wanted[:5], 3), fit_probe(noise[:5], wanted[:5], 3, 0.1)
    assert torch.equal(few[0][0], few[1][0])
