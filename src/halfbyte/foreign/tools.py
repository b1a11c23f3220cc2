"""The tools whose settings are understood, how a file of theirs is told, and their names for our settings.

It owns the one table of foreign names; it must not know how a recipe is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from halfbyte.errors import ConfigError
from halfbyte.foreign import axolotl, hugging_face, llama_factory
from halfbyte.foreign.draft import Draft
from halfbyte.foreign.keys import Joint, Keys, Taken


class Tool(NamedTuple):
    """A tool of the field.

    Attributes:
        title: Its name, for people.
        signature: Keys that only its files have.
        keys: What each key means.
        rule: Decides what several keys decide together.
    """

    title: str
    signature: frozenset[str]
    keys: Keys
    rule: Callable[[Draft], None]


TOOLS: dict[str, Tool] = {
    "axolotl": Tool(axolotl.TITLE, axolotl.SIGNATURE, axolotl.KEYS, axolotl.rule),
    "llama-factory": Tool(
        llama_factory.TITLE, llama_factory.SIGNATURE, llama_factory.KEYS, llama_factory.rule
    ),
    "peft": Tool(
        hugging_face.PEFT_TITLE, hugging_face.PEFT_SIGNATURE, hugging_face.PEFT_KEYS, hugging_face.peft_rule
    ),
    "trl": Tool(
        hugging_face.TRL_TITLE, hugging_face.TRL_SIGNATURE, hugging_face.TRL_KEYS, hugging_face.trl_rule
    ),
    "transformers": Tool(
        hugging_face.TRANSFORMERS_TITLE,
        hugging_face.TRANSFORMERS_SIGNATURE,
        hugging_face.TRANSFORMERS_KEYS,
        hugging_face.transformers_rule,
    ),
}

# Names that people write, and that are no tool's.
LOOSE_NAMES = {
    "rank": "lora.r",
    "lr": "train.learning_rate",
    "grad_accum": "train.gradient_accumulation_steps",
    "z_loss_weight": "train.z_loss",
}

FOREIGN_NAMES: dict[str, str] = LOOSE_NAMES | {
    name: meaning.setting
    for tool in reversed(TOOLS.values())
    for name, meaning in tool.keys.items()
    if isinstance(meaning, Taken | Joint)
}
"""What other tools of the field call a setting of ours."""


def tool_of(given: Mapping[str, Any], where: str) -> str:
    """Name of the tool whose file this is, by the keys that only its files have.

    Args:
        given: The file's keys.
        where: The file, for an error.

    Raises:
        ConfigError: HB104 if no tool's keys are there, or those of two.
    """
    telling = {name: sorted(tool.signature & given.keys()) for name, tool in TOOLS.items()}
    found = [name for name, keys in telling.items() if keys]
    apart = [name for name in found if name in {"axolotl", "llama-factory", "peft"}] or found
    if "trl" in apart and "transformers" in apart:  # TRL's arguments are transformers' and more
        apart.remove("transformers")
    if len(apart) == 1:
        return apart[0]
    seen = "; ".join(f"{name} has {', '.join(telling[name])}" for name in apart)
    raise ConfigError(
        "HB104",
        f"its keys are those of {len(apart)} tools: {seen}" if apart else "no key tells which tool it is of",
        where=where,
        fix=f"name the tool: --from {'|'.join(TOOLS)}",
    )
