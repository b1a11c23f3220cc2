"""The process in which a tokenizer's chat template runs, so that it can be stopped whatever it does.

It owns one loop: a job as a line of JSON in, a reply as a line of JSON out, within a time, a size and, where the
system has such limits, a memory; it must not know rows, and imports nothing of halfbyte, since it is run by its path.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

SECONDS_TO_START = 120


def render(job: dict[str, Any]) -> dict[str, Any]:
    """Render some beginnings of one conversation.

    Args:
        job: `template`, its `variables`, `tools` or null, `messages`, `asks` as pairs of how many messages and
            whether the generation prompt follows, `marks` whether to say what the last ask marks as generated,
            and `characters`, the most that a text may have.

    Returns:
        `texts` and `marks`; or `large`, the characters of a text that has too many; or `fault`, in words.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[str] = []
    marks: list[tuple[int, int]] = []
    for number, (count, generate) in enumerate(job["asks"], start=1):
        marked = job["marks"] and number == len(job["asks"])
        found: Any = render_jinja_template(
            conversations=[job["messages"][:count]],
            tools=job["tools"],
            chat_template=job["template"],
            return_assistant_tokens_mask=marked,
            add_generation_prompt=generate,
            **job["variables"],
        )
        text = found[0][0]
        if len(text) > job["characters"]:
            return {"large": len(text)}
        texts.append(text)
        marks = found[1][0] if marked else []
    return {"texts": texts, "marks": marks}


def reply_to(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job; the process ends if it takes longer than the job's `seconds`."""
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    try:
        return render(job)
    except MemoryError:
        return {"large": None}
    except Exception as error:  # a stranger's program may raise anything
        return {"fault": f"{type(error).__name__}: {error}"}
    finally:
        faulthandler.cancel_dump_traceback_later()


def limit_memory(nbytes: int) -> None:
    """Let this process have no more data than that, where the system knows such a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def main() -> None:
    """Answer jobs until there are no more; the first argument is the most bytes of data to use."""
    faulthandler.dump_traceback_later(SECONDS_TO_START, exit=True)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii", newline="\n")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks; without asker the input ends
    import_module("transformers.utils.chat_template_utils")  # now, so that no job's time pays for it
    limit_memory(int(sys.argv[1]))
    faulthandler.cancel_dump_traceback_later()
    for line in sys.stdin:
        replies.write(json.dumps(reply_to(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
