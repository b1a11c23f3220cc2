"""Learning from judged answers, as other tools ask for it.

It owns what their objectives and constants are here; it must not know any tool's other keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.foreign.draft import Draft
from halfbyte.settings import PREFERENCES, READ_BY_TASKS

BETA = 0.1
"""Where the other tool's objective, SimPO's too, stands if no key says so."""


def task(draft: Draft, objectives: Mapping[str, str], *keys: str) -> None:
    """Decide what the model is tuned for, and take back what that does not read.

    Args:
        draft: The file so far.
        objectives: Our tasks by the other tool's names, in lower case; the first key that is given and names none of
            them is refused.
        keys: Keys that decide, the one that says most first.
    """
    chosen = "sft"
    for key in keys:
        name = draft.get(key)
        if name is None or name is False:
            continue
        if (found := objectives.get(str(name).lower())) is None:
            draft.refuse(key, f"{name!r} is none of {', '.join(objectives)}")
            return
        chosen = found
        draft.set("task", chosen, *(k for k in keys if draft.get(k) is not None))
        break
    settle(draft, chosen)


def settle(draft: Draft, chosen: str) -> None:
    """Take back what a task does not read, and say what it reads if no key does."""
    for setting, readers in READ_BY_TASKS.items():
        if chosen not in readers and setting in draft.lines:
            draft.drop_section(setting, f"task {chosen} does not read it")
    if chosen in PREFERENCES:
        draft.default("preference.beta", BETA)
