import json
import math

import pytest
import torch
from torch.nn import functional as F

from offsite.config import EvalSpec
from offsite.data.read_rows import read_rows
from offsite.data.row import Row
from offsite.data.tokens import encode, encode_prompt
from offsite.errors import DataError, IncompatibleError
from offsite.evaluation.evaluate import evaluate, generate
from offsite.evaluation.intervals import Interval, interval
from offsite.evaluation.row_losses import perplexity
from offsite.models.loading import load_model
from offsite.models.tokenizers import load_tokenizer
from tiny import FAMILIES, tiny_base, tiny_rows

CPU = torch.device("cpu")
SPEC = EvalSpec(device="cpu", compute="fp32", threads=1)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("evaluate") / request.param, request.param, 3, pad="eos")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 9)


def test_the_loss_is_that_of_every_labelled_token(base, rows):
    score = evaluate(base, rows, SPEC)
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=torch.float32, device=CPU)
    expected = []
    for example in encode(read_rows(rows), tokenizer, source=rows, max_length=64).examples:
        with torch.no_grad():
            logits = model(torch.from_numpy(example.ids)[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.from_numpy(example.ids[1:]), reduction="none")[example.given - 1 :]
        expected.append((example.line, float(losses.sum()), len(losses)))
    assert [(row.line, row.tokens) for row in score.row_losses] == [(line, count) for line, _, count in expected]
    assert [row.nats for row in score.row_losses] == pytest.approx([nats for _, nats, _ in expected], rel=1e-5)
    assert score.tokens == sum(count for *_, count in expected)
    assert score.loss == pytest.approx(sum(nats for _, nats, _ in expected) / score.tokens, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert (score.rows, score.skipped) == (9, 0)


def test_how_rows_are_batched_does_not_matter(base, rows):
    one_by_one = evaluate(base, rows, SPEC.changed({"micro_batch_tokens": 1}))
    assert one_by_one.loss == pytest.approx(evaluate(base, rows, SPEC).loss, rel=1e-5)


def test_only_the_first_rows_are_scored_when_asked(base, rows):
    score = evaluate(base, rows, SPEC.changed({"max_rows": 4}))
    assert [row.line for row in score.row_losses] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["text", "choices"])
def test_a_tokenizer_with_tokens_that_the_model_does_not_know(tmp_path, kind):
    base = tiny_base(tmp_path / "base", blocks=1, vocab_size=270)
    row = (
        {"text": "The quick brown fox"} if kind == "text" else {"question": "x", "choices": ["x", "brown"], "answer": 0}
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(IncompatibleError, match="does not know: 1 row") as caught:
        evaluate(base, tmp_path / "rows.jsonl", SPEC)
    assert caught.value.reasons[0] == "the model knows tokens 0 to 269"
    assert "rows.jsonl:1: token" in caught.value.reasons[1]


def test_the_models_context_bounds_a_row(base, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": "fox " * 100}) + "\n" + json.dumps({"text": "fox"}) + "\n")
    with pytest.raises(DataError, match="longest") as caught:
        evaluate(base, file, SPEC)
    assert "at most 64" in str(caught.value)
    assert evaluate(base, file, SPEC.changed({"long_rows": "skip"})).skipped == 1


def test_samples_are_greedy_answers_to_the_first_prompts(base, rows):
    events = []
    score = evaluate(base, rows, SPEC, samples=2, progress=events.append)
    first, second = read_rows(rows)[:2]
    assert [(sample.prompt, sample.reference) for sample in score.samples] == [
        (first.prompt, first.completion),
        (second.prompt, second.completion),
    ]
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=torch.float32, device=CPU)
    ids = torch.tensor([encode_prompt(first, tokenizer)])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    answer = tokenizer.decode(theirs, skip_special_tokens=True)
    assert score.samples[0].answer.startswith(answer)
    assert {event.stage for event in events} == {"evaluating", "answering"}


def test_generation_with_a_cache_is_generation_without(base):
    model = load_model(base, dtype=torch.float32, device=CPU)
    ids = [5, 6, 7]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert generate(model, [5, 6, 7], -1, 12) == ids[3:]
    assert generate(model, [5, 6, 7], ids[5], 12) == ids[3 : ids.index(ids[5], 3)]


def test_a_text_without_a_prompt_gives_no_sample(base, tmp_path):
    assert evaluate(base, tiny_rows(tmp_path / "t.jsonl", 3, kind="text"), SPEC, samples=2).samples == ()


def test_perplexity_overflows_to_infinity():
    assert perplexity(1e4) == math.inf


QUESTIONS = [
    {"question": "The quick brown?", "choices": ["fox", "dog jumps over", "ö"], "answer": 0},
    {"question": "Who keeps the rows?", "choices": ["a data owner", "nobody"], "answer": 0},
    {"question": "left + right", "choices": ["return", "add", "model", "two parties who do not"], "answer": 3},
    {"question": "over the", "choices": ["lazy dog.", "x"], "answer": 1},
]


def written(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_choices_are_scored_by_their_log_likelihood(base, tmp_path):
    """Against a loop over the tokens of transformers' own logits."""
    file = written(tmp_path / "mc.jsonl", *QUESTIONS)
    score = evaluate(base, file, SPEC)
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=torch.float32, device=CPU)
    right, right_by_length = [], []
    for question, found in zip(QUESTIONS, score.choice_scores, strict=True):
        asked = encode_prompt(Row(1, f"Question: {question['question']}\nAnswer:", " x"), tokenizer)
        totals = []
        for choice in question["choices"]:
            ids = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([asked + ids])).logits[0]
            logs = torch.log_softmax(logits, dim=-1)
            totals.append(sum(float(logs[len(asked) - 1 + i, token]) for i, token in enumerate(ids)))
        assert found.log_likelihoods == pytest.approx(totals, rel=1e-5)
        by_length = [total / len(choice) for total, choice in zip(totals, question["choices"], strict=True)]
        right.append(totals.index(max(totals)) == question["answer"])
        right_by_length.append(by_length.index(max(by_length)) == question["answer"])
    assert [choice.right for choice in score.choice_scores] == right
    assert [choice.right_by_length for choice in score.choice_scores] == right_by_length
    assert score.accuracy == sum(right) / 4
    assert score.accuracy_norm == sum(right_by_length) / 4
    assert score.intervals["accuracy"] == interval(right)
    assert len(score.row_losses) == 4  # the right answers, as tuning sees them


def test_of_equal_choices_the_first_wins_and_length_counts_characters():
    from offsite.evaluation.multiple_choice import ChoiceScore

    assert ChoiceScore(1, (-2.0, -2.0), (1, 1), 0).right
    assert not ChoiceScore(1, (-2.0, -2.0), (1, 1), 1).right
    longer = ChoiceScore(1, (-4.0, -6.0), (2, 4), 1)  # -2 and -1.5 a character
    assert (longer.right, longer.right_by_length) == (False, True)


def test_every_figure_has_its_interval(base, tmp_path):
    file = written(
        tmp_path / "mixed.jsonl", {"text": "The lazy dog."}, {"text": "neither shows"}, *QUESTIONS,
        {"prompt": "The quick", "completion": " brown"},
    )  # fmt: skip
    score = evaluate(base, file, SPEC)
    assert score.intervals.keys() == {"loss", "perplexity", "completion_loss", "accuracy", "accuracy_norm"}
    answering = score.row_losses[2:]
    assert score.completion_loss == pytest.approx(
        sum(row.nats for row in answering) / sum(row.tokens for row in answering)
    )
    assert score.completion_loss != score.loss
    loss = score.intervals["loss"]
    assert loss == interval([row.nats for row in score.row_losses], [row.tokens for row in score.row_losses])
    assert loss.low < score.loss < loss.high
    assert score.intervals["perplexity"] == Interval(math.exp(loss.low), math.exp(loss.high))


def test_plain_text_has_neither_accuracy_nor_completions(base, tmp_path):
    score = evaluate(base, written(tmp_path / "t.jsonl", {"text": "The lazy dog."}), SPEC)
    assert (score.completion_loss, score.accuracy, score.accuracy_norm) == (None, None, None)
    assert score.intervals == {}  # one row says nothing of how rows vary


def test_a_long_text_is_scored_block_by_block(base, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    score = evaluate(base, file, SPEC)
    assert score.tokens == len(load_tokenizer(base)(file.read_text(), add_special_tokens=False)["input_ids"]) + 1
    assert score.rows == math.ceil(score.tokens / 63)
    assert evaluate(base, file, SPEC.changed({"max_rows": 2})).rows == 2
