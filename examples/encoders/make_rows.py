"""Rows for an encoder, from a seed: kinds of messages to a shop, words tagged in them, and requests that are alike.

    python -m examples.encoders.make_rows

It owns these rows, written here and free of other people's text; it must not know models or training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROWS = 240
GOODS = (
    "honey",
    "coffee",
    "olives",
    "candles",
    "soap",
    "rice",
    "blankets",
    "lamps",
    "pens",
    "tea",
    "bread",
    "salt",
)
CITIES = ("Lyon", "Porto", "Graz", "Turin", "Ghent", "Bergen", "Krakow", "Malmo", "Split", "Cork")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
OPENINGS = ("", "hello ,", "good morning ,", "dear shop ,", "hi there ,", "please note :")
KINDS = {
    "order": ("please send {good} to {city} by {day}", "I would like {good} , delivered in {city} on {day}"),
    "complaint": (
        "the {good} that came to {city} on {day} was broken",
        "my {good} never reached {city} , I am angry",
    ),
    "question": (
        "do you deliver {good} to {city} on {day} ?",
        "what does {good} cost if I fetch it in {city} ?",
    ),
    "thanks": (
        "the {good} reached {city} on {day} , thank you",
        "many thanks for the lovely {good} from all in {city}",
    ),
}
ALIKE = (
    ("send {good} to {city}", "order : {good} for {city}"),
    ("my {good} from {city} is broken", "complaint : {good} damaged , {city}"),
    ("is there {good} in the shop of {city} ?", "stock of {good} in {city}"),
)


def filled(random_: random.Random, pattern: str) -> tuple[list[str], list[str]]:
    """Words of a pattern with its places filled, and the tag of each."""
    places = {"{good}": ("GOOD", GOODS), "{city}": ("CITY", CITIES), "{day}": ("DAY", DAYS)}
    words, tags = [], []
    for word in pattern.split():
        tag, choices = places.get(word, ("O", (word,)))
        words.append(random_.choice(choices))
        tags.append(tag)
    return words, tags


def messages(seed: int) -> Iterator[tuple[str, list[str], list[str]]]:
    """Kind, words and tags of messages without end."""
    random_ = random.Random(seed)
    while True:
        kind = random_.choice(sorted(KINDS))
        words, tags = filled(random_, f"{random_.choice(OPENINGS)} {random_.choice(KINDS[kind])}")
        yield kind, words, tags


def make_rows() -> dict[str, list[dict[str, object]]]:
    """The rows of each file, no two alike."""
    kinds: dict[str, dict[str, object]] = {}
    tagged: dict[str, dict[str, object]] = {}
    for kind, words, tags in messages(seed=0):
        text = " ".join(words)
        kinds.setdefault(text, {"text": text, "label": kind})
        tagged.setdefault(text, {"tokens": words, "tags": tags})
        if len(kinds) == ROWS:
            break
    random_, alike = random.Random(1), {}
    places = [(good, city, pair) for good in GOODS for city in CITIES for pair in ALIKE]
    for good, city, (one, two) in random_.sample(places, ROWS):
        anchor, positive = (text.replace("{good}", good).replace("{city}", city) for text in (one, two))
        alike[anchor] = {"anchor": anchor, "positive": positive}
    return {
        "kinds.jsonl": [*kinds.values()],
        "words.jsonl": [*tagged.values()],
        "alike.jsonl": [*alike.values()],
    }


if __name__ == "__main__":
    for name, rows in make_rows().items():
        (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
