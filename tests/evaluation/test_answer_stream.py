import json
import shutil
from pathlib import Path

import pytest
import torch

from offsite.config import EvalSpec
from offsite.errors import DataError, IncompatibleError
from offsite.evaluation.answer_stream import Sampling, Speaker
from offsite.evaluation.evaluate import evaluate
from offsite.kernels.runtime import Runtime
from offsite.protocol.artifacts import Base
from tiny import tiny_base

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASK = [{"role": "user", "content": "The quick brown"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("speaker") / "base", blocks=2)


def ignored(text: str) -> None: ...


def test_the_greedy_answer_is_that_of_an_evaluation(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": ASK[0]["content"], "completion": " fox"}) + "\n")
    (sample,) = evaluate(Base(base), rows, EvalSpec(), samples=1).samples
    pieces: list[str] = []
    answer = Speaker(base, None, RUNTIME, raw=True).answer(ASK, Sampling(max_tokens=64), pieces.append)
    assert sample.answer.startswith(answer.text)  # both end at the context's limit or at the end token
    assert len(answer.text) > 5
    assert "".join(pieces) == answer.text
    assert len(pieces) > 2


def test_rules_of_the_checkpoint_do_not_apply(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    rules = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 2, "repetition_penalty": 9.0}
    (other / "generation_config.json").write_text(json.dumps(rules))
    found = [Speaker(one, None, RUNTIME).answer(ASK, Sampling(max_tokens=12), ignored) for one in (base, other)]
    assert found[0].text == found[1].text
    assert found[0].tokens == found[1].tokens == 12 or found[0].ended


def test_random_tokens_follow_the_seed(base: Path) -> None:
    speaker = Speaker(base, None, RUNTIME)
    texts = [speaker.answer(ASK, Sampling(20, 1.0, seed), ignored).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_conversation_is_written_by_the_template(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(base, tmp_path / "base")
    (other / "chat_template.jinja").write_text(TEMPLATE)
    speaker, raw = Speaker(other, None, RUNTIME), Speaker(other, None, RUNTIME, raw=True)
    assert (speaker.uses_template, raw.uses_template) == (True, False)
    turns = [*ASK, {"role": "assistant", "content": "fox"}, {"role": "user", "content": "And?"}]
    decoded = [str(one._tokenizer.decode(one._encoded(turns), skip_special_tokens=True)) for one in (speaker, raw)]
    assert decoded == ["[user]The quick brown[assistant]fox[user]And?[assistant]", "The quick brown\nfox\nAnd?"]
    (other / "chat_template.jinja").write_text("{{ raise_exception('only poems') }}")
    with pytest.raises(DataError, match="refuses the conversation"):
        Speaker(other, None, RUNTIME).answer(ASK, Sampling(), ignored)


def test_the_oldest_turns_make_room(base: Path) -> None:
    """Of 64 positions."""
    speaker = Speaker(base, None, RUNTIME)
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"{n} quick brown foxes"} for n in range(21)]
    ids, room = speaker._prompt_ids(turns, 32)
    assert room >= 16
    text = str(speaker._tokenizer.decode(ids, skip_special_tokens=True))
    assert text.endswith("20 quick brown foxes")
    assert not text.startswith("0 ")
    with pytest.raises(DataError, match="at most 64"):
        speaker._prompt_ids([{"role": "user", "content": "x y z " * 60}], 32)


def test_a_tokenizer_of_more_tokens_is_refused(base: Path) -> None:
    speaker = Speaker(base, None, RUNTIME)
    speaker._model.resize_token_embeddings(10)
    with pytest.raises(IncompatibleError, match="the model knows 10"):
        speaker.answer(ASK, Sampling(), ignored)
