import json
import math

import pytest
import torch
from torch.nn import functional as F

from offsite.config import EvalSpec
from offsite.core.data import encode, encode_prompt, read_rows
from offsite.core.load import load_model, load_tokenizer
from offsite.errors import DataError
from offsite.measure.evaluate import evaluate, generate, perplexity
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
    one_by_one = evaluate(base, rows, SPEC.model_copy(update={"micro_batch_tokens": 1}))
    assert one_by_one.loss == pytest.approx(evaluate(base, rows, SPEC).loss, rel=1e-5)


def test_only_the_first_rows_are_scored_when_asked(base, rows):
    score = evaluate(base, rows, SPEC.model_copy(update={"max_rows": 4}))
    assert [row.line for row in score.row_losses] == [1, 2, 3, 4]


def test_the_models_context_bounds_a_row(base, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": "fox " * 100}) + "\n" + json.dumps({"text": "fox"}) + "\n")
    with pytest.raises(DataError, match="longest") as caught:
        evaluate(base, file, SPEC)
    assert "at most 64" in str(caught.value)
    assert evaluate(base, file, SPEC.model_copy(update={"long_rows": "skip"})).skipped == 1


def test_samples_are_greedy_answers_to_the_first_prompts(base, rows):
    events = []
    score = evaluate(base, rows, SPEC, samples=2, progress=events.append)
    first, second = read_rows(rows)[:2]
    assert [(sample.prompt, sample.reference) for sample in score.samples] == [
        (first.prompt, first.completion),
        (second.prompt, second.completion),
    ]
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=torch.float32, device=CPU)
    ids = torch.tensor([encode_prompt(first.prompt, tokenizer)])
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
