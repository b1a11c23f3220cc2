"""Silent failures of this field that begin in the text a model is trained on, planted through the public interface.

The number in a test's name is that of the failure in the project's list of them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import halfbyte as hb
from halfbyte.config import load_config
from halfbyte.errors import DataError, ModelError
from halfbyte.pipeline import evaluate, run
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare

GOOD = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
NAMES = ("cat", "dog", "bird", "fish")
CHATS = [(f"Who saw the {a}?", f"The {b} saw it.") for a in NAMES for b in NAMES]


@pytest.fixture
def make(tmp_path: Path, shared: Callable[[str], Path]) -> Callable[..., Config]:
    """Settings of a run of a second, with a model whose chat template is the one given."""
    torch.set_num_threads(1)

    def build(
        *overrides: str, template: str = GOOD, chats: Sequence[tuple[str, str]] = CHATS, name: str = "model"
    ) -> Config:
        model = tmp_path / name
        shutil.copytree(
            shared("models/stories260K-hf"), model, copy_function=shutil.copyfile, dirs_exist_ok=True
        )
        model.chmod(0o755)
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in chats
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        base: dict[str, Any] = {
            "model": str(model),
            "output_dir": str(tmp_path / "run"),
            "dtype": "float32",
            "lora": {"r": 2},
            "data": {"train": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.25},
            "train": {"max_steps": 1},
            "evaluate": {"exact_match": False, "bootstrap": 100},
        }
        return load_config(None, overrides, base)

    return build


def test_hostile_2_stop_token_is_not_trained(make: Callable[..., Config]) -> None:
    """The template leaves the stop token out, or its marks do, or a stop is no token; and pad = eos hides none."""
    faults = {
        GOOD.replace("{{ eos_token }}", "\n"): "writes no stop token",
        GOOD.replace(
            " {{ m.content }}", "{% generation %} {{ m.content }}{% endgeneration %}"
        ): "leave out the stop",
    }
    for template, said in faults.items():
        with pytest.raises(DataError, match=said) as caught:
            hb.run(make(template=template))
        assert caught.value.code == "HB207"
        assert "16 of 16 rows" in caught.value.what
        assert "rows.jsonl:1: " in caught.value.what
    config = make()
    file = Path(config.model) / "tokenizer_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(facts | {"pad_token": facts["eos_token"]}), encoding="utf-8")
    task = prepare(config)
    assert task.tokenizer.pad_token_id == task.tokenizer.eos_token_id
    for example in (*task.rows.train, *task.rows.held_out):
        assert example.input_ids[-1] == task.tokenizer.eos_token_id
        assert example.trained[-1]


def test_hostile_3_no_token_is_trained(make: Callable[..., Config], tmp_path: Path) -> None:
    """A long question leaves no room for its answer: the loss of that row would be nothing at all."""
    long = [*CHATS, ("Who saw it? " * 60, "The cat.")]
    with pytest.raises(DataError) as caught:
        hb.run(make("data.max_length=100", "data.max_truncated=1", chats=long))
    assert caught.value.code == "HB208"
    assert "rows.jsonl:17: its first trained token is number" in caught.value.what
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer is blank \(message 2\)") as caught:
        hb.run(make("output_dir=" + str(tmp_path / "other"), chats=[CHATS[0], ("Who?", " \n")]))
    assert caught.value.code == "HB204"


def test_hostile_4_template_differs_or_begins_twice(make: Callable[..., Config], tmp_path: Path) -> None:
    """Served with another template or tokenizer than trained with, and a BOS from both template and tokenizer."""
    with pytest.raises(DataError, match=r"begins at token 1 and again at token \d") as caught:
        hb.run(make(template="\n" + GOOD))
    assert caught.value.code == "HB220"
    result = hb.run(make(), evaluate=False, overwrite=True)
    assert evaluate(make(), result.result).metrics
    for other, said in (
        (
            make(template=GOOD.replace("Q:", "Question:"), name="other"),
            "the text of the chat format tokenizer",
        ),
        (make("data.template=zephyr"), "the chat format is zephyr, not tokenizer"),
    ):
        with pytest.raises(ModelError, match=said) as refused:
            evaluate(other, result.result)
        assert refused.value.code == "HB326"
    file = Path(make(name="merges").model) / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["model"]["merges"].pop()
    file.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ModelError, match="the tokenizer is another"):
        evaluate(load_config(None, (f"model={file.parent}",), make().model_dump()), result.result)


def test_hostile_4_a_base_trained_with_another_format_is_told(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    """Tuning a tuned model in another chat format is allowed, but never unseen."""
    base = tmp_path / "tuned"
    hb.run(make("method=full"), evaluate=False).result.rename(base)
    shutil.rmtree(tmp_path / "run")
    screen = io.StringIO()
    for template, seen in ((None, False), ("zephyr", True)):
        config = make(f"model={base}", *([f"data.template={template}"] if template else []))
        run(config, evaluate=False, overwrite=False, watch=Watch(Console(file=screen, width=500)))
        shutil.rmtree(config.output_dir)
        assert ("the chat format is zephyr, not tokenizer" in screen.getvalue()) is seen


def test_hostile_14_rows_are_cut_unseen(make: Callable[..., Config]) -> None:
    """A tenth of the rows loses its end; the run says so and stops, or says how many of which side."""
    long = [(q, a + " It ran." * (60 if n % 8 == 0 else 0)) for n, (q, a) in enumerate(CHATS)]
    with pytest.raises(DataError) as caught:
        hb.run(make("data.max_length=120", chats=long))
    assert caught.value.code == "HB221"
    assert "expected at most 5.0%" in caught.value.what
    assert "rows.jsonl:1: " in caught.value.what or "rows.jsonl:9: " in caught.value.what
    task = prepare(make("data.max_length=120", "data.max_truncated=1", chats=long))
    assert sum(task.rows.cut) == 2
    sides = (task.rows.train, task.rows.held_out)
    for name, side, cut in zip(("to train on", "held out"), sides, task.rows.cut, strict=True):
        assert sum(example.truncated for example in side) == cut
        assert f"{len(side)} {name}" + (f" ({cut} cut at max_length)" if cut else "") in task.described()


def test_hostile_12_tokens_are_kept_from_other_text(make: Callable[..., Config], tmp_path: Path) -> None:
    """Chat template, tokenizer, a row's byte or the longest row changes: the run before does not help."""
    cache = f"data.cache={tmp_path / 'cache'}"

    def tokens(config: Config) -> tuple[list[list[int]], list[str]]:
        task = prepare(config)
        return [e.input_ids.tolist() for e in (*task.rows.train, *task.rows.held_out)], task.notes()

    first, notes = tokens(make(cache))
    assert notes == []
    assert tokens(make(cache, name="same")) == (first, [])
    assert len(list((tmp_path / "cache").iterdir())) == 1
    found, notes = tokens(make(cache, "data.max_length=20", "data.max_truncated=1"))
    assert found != first
    assert notes == ["Rows are tokenised again: other data.max_length than last time."]
    found, notes = tokens(make(cache, template=GOOD.replace("Q:", "A:")))
    assert found != first
    assert "other chat format" in notes[0]
    other = make(cache, name="merges")
    file = Path(other.model) / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["model"]["merges"].pop(0)
    file.write_text(json.dumps(facts), encoding="utf-8")
    found, notes = tokens(other)
    assert found != first
    assert "tokenizer" in notes[0]
    config = make(cache, name="same")
    rows = tmp_path / "rows.jsonl"
    state = rows.stat()
    rows.write_bytes(rows.read_bytes().replace(b"Who saw the cat", b"Who saw the rat", 1))
    os.utime(rows, ns=(state.st_atime_ns, state.st_mtime_ns))  # neither size nor time tells of it
    found, notes = tokens(config)
    assert found != first
    assert "other rows" in notes[0]
