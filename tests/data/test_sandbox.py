"""A stranger's template: stopped in time, held to a size, kept from files, and never the end of the work."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import sandbox
from halfbyte.data.sandbox import Job, run_template
from halfbyte.errors import DataError

HELLO = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
# What a second of time limit may cost besides: ending the process, on a machine that is busy.
SLACK_S = 20.0


def job(template: str, *contents: str) -> Job:
    messages = [{"role": "user", "content": content} for content in contents or ("Hi",)]
    return Job(template, {"eos_token": "</s>"}, messages, None, [(len(messages), False)])


def refused(template: str) -> DataError:
    with pytest.raises(DataError) as caught:
        run_template(job(template))
    assert caught.value.fix
    return caught.value


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    run_template(job(HELLO))  # the process is there, so that its start is not on the clock
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %} {% endfor %}{% endfor %}",
    "macros that call each other twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "one operation on a number": "{{ 7 ** 900000000 }}",
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.usefixtures("_short")
def test_a_template_without_an_end_is_stopped(name: str) -> None:
    began = time.monotonic()
    error = refused(ENDLESS[name])
    assert time.monotonic() - began < 1.0 + SLACK_S
    assert error.code in ("HB222", "HB223")
    assert error.code == "HB222" or "loops that write" in name
    assert run_template(job(HELLO)).texts == ["Hi</s>"], "the next template is run as if nothing had been"


@pytest.mark.usefixtures("_short")
def test_a_template_is_stopped_in_a_thread_as_well() -> None:
    caught: list[str] = []

    def work() -> None:
        caught.append(refused(ENDLESS["nested loops"]).code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(1.0 + SLACK_S)
    assert caught == ["HB222"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 20000000 }}", "writes 20,000,000 characters, expected at most 10,000,000"),
        ("{{ 'a' * 200000000000 }}", "writes more than memory holds"),
        ("{{ '%99999999999d' % 1 }}", "writes more than memory holds"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
            "writes more than memory holds",
        ),
    ],
)
def test_a_template_that_writes_too_much_is_refused(template: str, said: str) -> None:
    error = refused(template)
    assert error.code == "HB223"
    assert said in error.what
    assert run_template(job(HELLO)).texts == ["Hi</s>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% include 'secret.txt' %}", "no loader"),
        ("{% import 'secret.txt' as s %}", "no loader"),
        ("{{ open('secret.txt').read() }}", "UndefinedError: 'open' is undefined"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
        ("{{ raise_exception.__globals__['os'] }}", "SecurityError"),
        ("{{ (messages | attr('__class__')).mro() }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_reaches_out_fails(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("password", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    error = refused(template)
    assert error.code == "HB206"
    assert said in error.what
    assert "password" not in error.what


def test_what_a_template_writes_does_not_depend_on_who_asks() -> None:
    contents = [f"é🙂\n\u2028{number}" for number in range(40)]
    found: dict[str, str] = {}

    def ask(content: str) -> None:
        found[content] = run_template(job(HELLO, content)).texts[0]

    threads = [threading.Thread(target=ask, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {content: f"{content}</s>" for content in contents}


def test_a_process_that_died_is_started_again() -> None:
    run_template(job(HELLO))
    process: Any = sandbox._PROCESS._process
    process.kill()
    process.wait()
    assert run_template(job(HELLO)).texts == ["Hi</s>"]


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C reaches other processes in another way here")
def test_ctrl_c_does_not_end_the_process() -> None:
    """It reaches every process of the terminal; the one who asks decides what it means."""
    run_template(job(HELLO))
    process: Any = sandbox._PROCESS._process
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert run_template(job(HELLO)).texts == ["Hi</s>"]
    assert sandbox._PROCESS._process is process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_gets_a_process_of_its_own() -> None:
    run_template(job(HELLO))
    before: Any = sandbox._PROCESS._process
    child = os.fork()
    if child == 0:
        ours = run_template(job(HELLO, "child")).texts == ["child</s>"]
        theirs: Any = sandbox._PROCESS._process
        theirs.kill()
        os._exit(0 if ours and theirs.pid != before.pid else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert run_template(job(HELLO)).texts == ["Hi</s>"]
    assert sandbox._PROCESS._process is before


def test_transformers_writes_the_same(templated: Callable[[str, str], Any]) -> None:
    tokenizer = templated("base-11m", "chatml")
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": " é "}]
    written = run_template(
        Job(
            tokenizer.chat_template,
            dict(tokenizer.special_tokens_map),
            messages,
            None,
            [(1, True), (2, False)],
        )
    )
    assert written.texts == [
        tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(messages, tokenize=False),
    ]
