"""Promises of the other verbs: eval, quantize, data, config, doctor."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from halfbyte.cli.app import app
from halfbyte.cli.consoles import size
from halfbyte.kernels import native
from halfbyte.settings import SETTINGS

Call = Callable[..., Result]


def test_eval_gives_loss_and_exact_match_with_intervals(
    call: Call, model: Path, rows: Path, tmp_path: Path
) -> None:
    arguments = ("eval", model, rows, "--output", tmp_path / "out", "--set", "evaluate.max_new_tokens=4")
    table = call(*arguments)
    assert table.exit_code == 0, table.stderr
    for part in ("exact match", "held-out loss", "perplexity", "95 % interval"):
        assert part in table.stdout
    facts = json.loads(call(*arguments, "--json").stdout)
    assert facts["loss"]["low"] < facts["loss"]["value"] < facts["loss"]["high"]
    assert facts["exact_match"]["n"] == 16
    lines = (tmp_path / "out" / "stories260K-hf.loss.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == 16


def test_eval_puts_the_adapter_on_top(
    call: Call, recipe: Path, model: Path, rows: Path, tmp_path: Path
) -> None:
    assert call("train", recipe, "--set", "train.epochs=8").exit_code == 0
    plain = ("eval", model, rows, "--quantization", "nf4", "--set", "evaluate.exact_match=false", "--json")
    adapter = ("--adapter", tmp_path / "run" / "adapter")
    out = ("--output", tmp_path / "out")
    before = json.loads(call(*plain, *out).stdout)
    after = json.loads(call(*plain, *out, *adapter).stdout)
    assert after["loss"]["value"] < 0.7 * before["loss"]["value"]
    assert (tmp_path / "out" / "adapter.loss.jsonl").exists()


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_quantize_writes_a_smaller_folder_that_measures_the_same(
    call: Call, model: Path, rows: Path, tmp_path: Path, format_: str
) -> None:
    out = tmp_path / "small"
    facts = json.loads(call("quantize", model, out, "--format", format_, "--json").stdout)
    assert facts["bytes_after"] < 0.5 * facts["bytes_before"]
    measure = (
        "--set", "dtype=float32", "--set", "evaluate.exact_match=false", "--output", tmp_path / "e", "--json"
    )  # fmt: skip
    stored = json.loads(call("eval", out, rows, *measure).stdout)
    in_memory = json.loads(call("eval", model, rows, "--quantization", format_, *measure).stdout)
    assert stored["loss"] == in_memory["loss"]
    assert "times smaller" in call("quantize", model, tmp_path / "again").stdout


def test_quantize_never_replaces_files_of_something_else(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    refused = call("quantize", model, tmp_path)
    assert refused.exit_code == 2
    assert "HB316" in refused.stderr
    assert (tmp_path / "notes.txt").exists()


def test_quantize_says_what_it_would_write_and_writes_nothing(
    call: Call, model: Path, tmp_path: Path
) -> None:
    facts = json.loads(call("quantize", model, tmp_path / "small", "--dry-run", "--json").stdout)
    assert not list(tmp_path.iterdir())
    written = json.loads(call("quantize", model, tmp_path / "small", "--json").stdout)
    same = ("bytes_before", "bytes_after", "parameters", "format", "scales", "output")
    assert {key: facts[key] for key in same} == {key: written[key] for key in same}
    assert facts["bytes_after"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert facts["bytes_needed"] == facts["bytes_after"]
    assert facts["bytes_free"] > 0
    assert "of disk are needed" in call("quantize", model, tmp_path / "other", "--dry-run").stdout


def test_quantize_verifies_every_byte(call: Call, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    call("quantize", model, out)
    assert "all as they were written" in call("quantize", out, "--verify").stdout
    assert json.loads(call("quantize", out, "--verify", "--json").stdout)["ok"] is True
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    refused = call("quantize", out, "--verify")
    assert refused.exit_code == 2
    assert "HB359" in refused.stderr
    assert "HB366" in call("quantize", model, "--verify").stderr


def test_quantize_wants_a_folder_to_write_or_one_to_verify(call: Call, model: Path, tmp_path: Path) -> None:
    for arguments, named in (
        ((model,), "OUT"),
        ((model, tmp_path / "a", "--verify"), "--verify"),
        ((model, "--verify", "--dry-run"), "--verify"),
    ):
        refused = call("quantize", *arguments)
        assert refused.exit_code == 2
        assert named in refused.stderr


def test_quantize_interrupted_says_that_the_same_command_goes_on(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.report.watch import Part

    def interrupt(self: Part, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Part, "progress", interrupt)
        stopped = call("quantize", model, tmp_path / "small")
    assert stopped.exit_code == 130
    assert f"{tmp_path / 'small'}.partial; the same command goes on" in stopped.stderr
    assert not (tmp_path / "small").exists()
    assert "were finished before" in call("quantize", model, tmp_path / "small").stderr
    assert (tmp_path / "small").exists()
    assert not (tmp_path / "small.partial").exists()


def test_data_check_counts_and_names_bad_lines(call: Call, rows: Path) -> None:
    assert json.loads(call("data", "check", rows, "--json").stdout)["rows"] == 16
    assert "16" in call("data", "check", rows).stdout
    rows.write_text(rows.read_text(encoding="utf-8") + "{broken\n[]\n", encoding="utf-8")
    refused = call("data", "check", rows)
    assert refused.exit_code == 2
    assert f"{rows}:17" in refused.stderr
    assert f"{rows}:18" in refused.stderr


def test_data_check_says_what_each_file_is_read_as(
    call: Call, rows: Path, tmp_path: Path, model: Path
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("prompt,chosen,rejected\na,b,c\n", encoding="utf-8")
    shown = call("data", "check", pairs).stdout
    assert f"{pairs}: preference" in shown
    assert re.search(r"^objective +preference$", shown, re.MULTILINE)
    facts = json.loads(call("data", "check", rows, "--json").stdout)
    assert facts["formats"] == {str(rows): "prompt_completion"}
    assert facts["objective"] == "sft"
    for refused in (
        call("data", "check", rows, pairs),
        call("data", "check", pairs, "--model", model),
        call("data", "show", pairs, "--model", model),
        call("eval", model, pairs),
    ):
        assert refused.exit_code == 2
        assert "HB216" in refused.stderr
    assert call("data", "check", pairs, "--format", "kto").exit_code == 2


def test_bad_rows_are_skipped_by_every_verb_that_reads_rows(
    call: Call, rows: Path, model: Path, tmp_path: Path
) -> None:
    rows.write_text(rows.read_text(encoding="utf-8") + "{broken\n[]\n", encoding="utf-8")
    shown = call("data", "check", rows, "--skip-bad-rows", 2).stdout
    assert re.search(r"^rows +16$", shown, re.MULTILINE)
    assert re.search(rf"^skipped +2\n +- {rows}:17: not JSON", shown, re.MULTILINE)
    facts = json.loads(call("data", "check", rows, "--skip-bad-rows", 2, "--json").stdout)
    assert [fault["line"] for fault in facts["skipped"]] == [17, 18]
    shown = call("data", "show", rows, "--model", model, "--skip-bad-rows", 2).stdout
    assert "16 rows, 2 bad rows skipped" in shown
    measured = call(
        "eval", model, rows, "--skip-bad-rows", 2, "--set", "evaluate.exact_match=false", "--output", tmp_path
    )
    assert measured.exit_code == 0
    assert f"{rows}:18" in measured.stderr.replace("\n", "")
    for arguments in (
        ("data", "check", rows),
        ("data", "show", rows, "--model", model),
        ("eval", model, rows),
    ):
        refused = call(*arguments, "--skip-bad-rows", 1)
        assert refused.exit_code == 2
        assert "1 may be skipped in all" in refused.stderr


def test_data_check_with_a_model_counts_tokens_and_fills_passes(call: Call, rows: Path, model: Path) -> None:
    arguments = ("data", "check", rows, "--model", model, "--set", "train.batch_tokens=40", "--set")
    facts = json.loads(call(*arguments, "data.max_length=40", "--json").stdout)["tokens"]
    assert 2 <= facts["lengths"]["shortest"] <= facts["lengths"]["longest"] <= 40
    assert facts["passes"]["batch_tokens"] == 40
    assert facts["passes"]["passes"] * facts["passes"]["rows_per_pass"] == pytest.approx(16)
    assert 0.5 < facts["passes"]["fill"] <= 1.0
    assert facts["cut"] == 0
    shown = call(*arguments, "data.max_length=12", "--set", "data.max_truncated=1").stdout
    assert "16 rows cut at max_length" in shown
    # 16 rows of 12 tokens, 3 of which fit: 6 passes, 192 of 240 tokens
    assert "6 of 40 tokens, 80.0% full, 2.7 rows each" in shown
    refused = call(*arguments, "data.max_length=41")
    assert refused.exit_code == 2
    assert "HB102" in refused.stderr


def test_data_show_brackets_what_is_trained(call: Call, rows: Path, model: Path) -> None:
    shown = call("data", "show", rows, "--model", model, "-n", "2").stdout
    assert "The cat [big]⟦ saw the cat.</s>⟧" in shown
    assert "rows.jsonl:2" in shown
    assert "rows.jsonl:3" not in shown


def test_data_show_shows_what_is_cut(call: Call, rows: Path, model: Path) -> None:
    shown = call("data", "show", rows, "--model", model, "-n", "1", "--max-length", "12").stdout
    assert "12 tokens" in shown
    assert "cut at max_length" in shown
    assert "</s>⟧" not in shown


def test_data_show_shows_tools_and_brackets_their_calls(
    call: Call, tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    function = {"name": "sky", "parameters": {"type": "object"}}
    talk = [
        {"from": "human", "value": "Dry?"},
        {"from": "function_call", "value": '{"name": "sky", "arguments": {"city": "Ulm"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "No."},
    ]
    file = tmp_path / "tools.jsonl"
    file.write_text(json.dumps({"conversations": talk, "tools": json.dumps([function])}) + "\n")
    model = shared("models/base-11m")
    shown = call("data", "show", file, "--model", model, "--template", "qwen2").stdout
    called = '<tool_call>\n{"name": "sky", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>'
    assert f"<|im_start|>assistant\n⟦{called}⟧" in shown
    assert '<tools>\n{"type": "function", "function": {"name": "sky", "parameters"' in shown
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>" in shown
    assert "<|im_start|>assistant\n⟦No.<|im_end|>⟧" in shown
    refused = call("data", "show", file, "--model", model, "--template", "chatml")
    assert refused.exit_code == 2
    assert "HB225" in refused.stderr


def test_doctor_says_where_tokenised_rows_are_kept_and_how_large_they_are(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "0 kept in" in call("doctor").stdout
    folder = tmp_path / "halfbyte" / "rows" / "a"
    folder.mkdir(parents=True)
    (folder / "ids.bin").write_bytes(b"a" * 3000)
    facts = json.loads(call("doctor", "--json").stdout)["cache"]
    assert facts == {"folder": str(folder.parent), "kept": 1, "bytes": 3000}


@pytest.fixture
def chat_rows(tmp_path: Path) -> Path:
    """Three conversations with a system message."""
    file = tmp_path / "chats.jsonl"
    turns = [
        ("system", "Be brief."),
        ("user", "Hi é🙂"),
        ("assistant", "Hello!"),
        ("user", "a"),
        ("assistant", "b"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = json.dumps({"messages": messages}, ensure_ascii=False)
    file.write_text(f"{row}\n" * 3, encoding="utf-8")
    return file


def test_data_show_shows_special_tokens_and_counts_them(call: Call, chat_rows: Path, model: Path) -> None:
    shown = call("data", "show", chat_rows, "--model", model, "-n", "1", "--template", "llama2").stdout
    assert "template llama2, 3 rows" in shown
    assert (
        "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi é🙂 [/INST]⟦ Hello! </s>⟧<s> [INST] a [/INST]⟦ b </s>⟧"
    ) in shown
    assert re.search(r"chats\.jsonl:1 +\d+ tokens, 4 of them special, \d+ trained\n", shown)


def test_data_show_shows_one_row_and_its_ids(call: Call, chat_rows: Path, model: Path) -> None:
    arguments = ("data", "show", chat_rows, "--model", model, "--template", "zephyr")
    shown = call(*arguments, "--row", "2", "--tokens").stdout
    assert "chats.jsonl:2" in shown
    assert "chats.jsonl:1" not in shown
    assert "chats.jsonl:3" not in shown
    cells = re.findall(r"(⟦?)(\d+):('.*?'|\".*?\")⟧?(?=  |\n)", shown)
    count = int(re.search(r"(\d+) tokens", shown)[1])  # type: ignore[index]
    trained = int(re.search(r"(\d+) trained", shown)[1])  # type: ignore[index]
    assert len(cells) == count
    assert sum(mark == "⟦" for mark, _, _ in cells) == trained
    assert ("⟦", "2", "'</s>'") in cells
    refused = call(*arguments, "--row", "4")
    assert refused.exit_code == 2
    assert "HB102" in refused.stderr
    assert "at most 3" in refused.stderr


def test_data_show_marks_the_cut(call: Call, chat_rows: Path, model: Path) -> None:
    arguments = ("data", "show", chat_rows, "--model", model, "-n", "1", "--template", "llama2")
    whole = call(*arguments).stdout
    cut = call(*arguments, "--max-length", "60").stdout
    assert "✂" not in whole
    assert cut.rstrip().endswith("✂")
    assert "60 tokens" in cut


def test_data_show_uses_colour_on_a_terminal(
    chat_rows: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr("halfbyte.cli.data.STDOUT", screen)
    done = CliRunner().invoke(app, ["data", "show", str(chat_rows), "--model", str(model), "-n", "1"])
    assert done.exit_code == 0, done.stderr
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "⟦" not in shown
    assert "\x1b[1;32m" in shown
    assert "\x1b[2;36m" in shown


def test_data_check_refuses_what_training_would(call: Call, chat_rows: Path, model: Path) -> None:
    arguments = ("data", "check", chat_rows, "--model", model, "--set", "data.max_length=60")
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "HB221" in refused.stderr
    assert f"{chat_rows}:3" in refused.stderr
    assert call(*arguments, "--set", "data.max_truncated=1").exit_code == 0


def test_config_schema_lists_every_setting(call: Call) -> None:
    table = call("config", "schema").stdout
    assert all(name in table for name in SETTINGS)
    schema = json.loads(call("config", "schema", "--json").stdout)
    assert set(schema["required"]) == {"model", "data"}


def test_doctor_says_what_runs_and_why(call: Call) -> None:
    facts = json.loads(call("doctor", "--json").stdout)
    assert {choice["operation"] for choice in facts["kernels"]} >= {"linear", "dequantize_4bit"}
    assert facts["hardware"]["cores"] >= 1
    assert facts["versions"]["torch"]
    assert facts["threads"] == 1
    assert facts["native_kernels"] is (native.module() is not None)
    assert "linear_grad" in call("doctor").stdout


def test_every_command_says_so_when_native_kernels_are_not_used(rows: Path) -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "data", "check", str(rows), "--json"],
        env={**os.environ, native.BACKEND_VARIABLE: "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stderr.splitlines()) == 1
    assert "slow" in done.stderr
    assert json.loads(done.stdout)["rows"] == 16


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (None, "unknown"),
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (560 << 20, "560 MiB"),
        (3 << 40, "3.0 TiB"),
    ],
)
def test_sizes_read_in_binary_units(nbytes: int | None, text: str) -> None:
    assert size(nbytes) == text
