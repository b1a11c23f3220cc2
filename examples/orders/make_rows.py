"""Own the orders dataset: phrase free-form orders, write the record of each, and save train and held-out rows.

It must not know which model is trained on them. Run from the repository's root:
`python -m examples.orders.make_rows`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.orders.vocabulary import CITIES, GOODS, NAMES
from examples.tiny_base.words import DAYS, article, counted, number_in_words

FOLDER = Path(__file__).parent
SEED = 7
TRAIN_ROWS = 2400
HELD_OUT_ROWS = 200
# Goods and the units they are sold in; none for what is sold by the piece.
SOLD = [(item, tuple(units.split())) for units, items in GOODS.items() for item in items.split(", ")]


@dataclass(frozen=True)
class Order:
    """What a customer wants; unit and day may be empty: the order has none."""

    item: str
    quantity: int
    unit: str
    name: str
    city: str
    day: str

    def record(self) -> str:
        """Write the order as the record that the model is to answer: `item: honey, quantity: 2, unit: jar`."""
        fields = {
            "item": self.item,
            "quantity": str(self.quantity),
            "unit": self.unit,
            "name": self.name,
            "city": self.city,
            "day": self.day,
        }
        return ", ".join(f"{key}: {value}" for key, value in fields.items() if value)


def draw_order(rng: random.Random) -> Order:
    """Draw an order; what is sold by the piece has no unit, and one order in five names no day."""
    item, units = rng.choice(SOLD)
    quantity = rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 12, 15, 20, 24, rng.randint(11, 60)))
    return Order(
        item=item,
        quantity=quantity,
        unit=rng.choice(units) if units else "",
        name=rng.choice(NAMES),
        city=rng.choice(CITIES),
        day=rng.choice((*DAYS, "today", "tomorrow")) if rng.random() < 0.8 else "",
    )


# --- phrases for one part of an order -------------------------------------------------------------------------------


def amount(rng: random.Random, quantity: int, noun: str) -> str:
    """Say how many: `3 boxes`, `three boxes`, `a dozen boxes`."""
    nouns = counted(quantity, noun)
    ways = [f"{quantity} {nouns}", f"{quantity} {nouns}", f"{number_in_words(quantity)} {nouns}"] * 2
    special = {
        1: [article(noun), f"a single {noun}", f"just one {noun}"],
        2: [f"a couple of {nouns}", f"a pair of {nouns}"],
        6: [f"half a dozen {nouns}"],
        12: [f"a dozen {nouns}"],
        24: [f"two dozen {nouns}"],
    }
    ways += special.get(quantity, []) * 2
    return rng.choice(ways)


def goods(rng: random.Random, order: Order) -> str:
    """Name the goods and their amount."""
    if not order.unit:
        return amount(rng, order.quantity, order.item)
    said = amount(rng, order.quantity, order.unit)
    if rng.random() < 0.12:
        return f"{order.item}, {said},"
    return f"{said} of {order.item}"


def destination(rng: random.Random, order: Order, preposition: str) -> str:
    """Say who and where it is for: `for Maria in Lyon`."""
    name, city = order.name, order.city
    relative = rng.choice(("my friend", "our neighbour", "my cousin", "my colleague", "our guest"))
    return rng.choice(
        (
            f"{preposition} {name} in {city}",
            f"{preposition} {name} in {city}",
            f"{preposition} {name}, {city}",
            f"to {city}, for {name}",
            f"{preposition} {relative} {name} in {city}",
            f"{preposition} {name}, who lives in {city},",
            f"{preposition} {name} over in {city}",
        )
    )


def time(rng: random.Random, order: Order) -> str:
    """Say when; empty if the order does not."""
    if not order.day:
        return ""
    if order.day in ("today", "tomorrow"):
        return rng.choice(("{}", "{}", "by {}", "{} if possible")).format(order.day)
    ways = ("by {}", "on {}", "for {}", "before {}", "this {}", "on {} morning", "by {} evening", "next {}")
    return rng.choice(ways).format(order.day)


# --- whole orders ---------------------------------------------------------------------------------------------------


def joined(*parts: str, end: str = ".") -> str:
    """Join the parts that are not empty into one sentence."""
    sentence = " ".join(part for part in parts if part).rstrip(",")
    return sentence[0].upper() + sentence[1:] + end


SENDING = ("could you send", "can you ship", "would you send", "could you please deliver", "can you bring")
TELLING = ("please send", "send", "please ship", "kindly deliver", "please get")
WANTING = (
    "I need",
    "we need",
    "I'd like",
    "I would like to order",
    "we want",
    "put me down for",
    "I'm after",
)


def asked(rng: random.Random, order: Order) -> str:
    """`Could you send three boxes of green tea to Maria in Lyon by Friday?`"""
    parts = [goods(rng, order), destination(rng, order, rng.choice(("to", "for"))), time(rng, order)]
    please = rng.choice(("", "", "please"))
    if rng.random() < 0.5:
        return joined(rng.choice(SENDING), *parts, please, end=rng.choice("??."))
    return joined(rng.choice(TELLING), *parts)


def wanted(rng: random.Random, order: Order) -> str:
    """`I need three boxes of green tea for Maria in Lyon by Friday.`"""
    return joined(rng.choice(WANTING), goods(rng, order), destination(rng, order, "for"), time(rng, order))


def time_first(rng: random.Random, order: Order) -> str:
    """`By Friday we need three boxes of green tea for Maria in Lyon.`"""
    verb = rng.choice((*WANTING, *TELLING))
    return joined(time(rng, order), verb, goods(rng, order), destination(rng, order, "for"))


def note(rng: random.Random, order: Order) -> str:
    """`3 boxes of green tea to Maria in Lyon by Friday, please.`"""
    parts = [goods(rng, order), destination(rng, order, rng.choice(("to", "for"))), time(rng, order)]
    return joined(*parts, end=rng.choice((", please.", ".", ", thanks!", "")))


def place_first(rng: random.Random, order: Order) -> str:
    """`For Maria in Lyon: three boxes of green tea by Friday.`"""
    where = destination(rng, order, "for").rstrip(",")
    return joined(f"{where}:", goods(rng, order), time(rng, order))


def introduced(rng: random.Random, order: Order) -> str:
    """`This is Maria from Lyon. I need three boxes of green tea by Friday.`"""
    home = f"{order.name} {rng.choice(('from', 'in'))} {order.city}"
    opening = rng.choice((f"This is {home}.", f"{home} here.", f"My name is {home}."))
    verb = rng.choice((*WANTING, *TELLING))
    return f"{opening} {joined(verb, goods(rng, order), time(rng, order))}"


def needed(rng: random.Random, order: Order) -> str:
    """`Maria in Lyon needs three boxes of green tea by Friday.`"""
    who = f"{order.name} {rng.choice(('in', 'from'))} {order.city}"
    verb = rng.choice(("needs", "wants", "would like", "asked for", "is waiting for"))
    return joined(who, verb, goods(rng, order), time(rng, order))


def in_sentences(rng: random.Random, order: Order) -> str:
    """`I'd like three boxes of green tea. It is for Maria in Lyon. Friday would be perfect.`"""
    sentences = [joined(rng.choice(WANTING), goods(rng, order))]
    where = destination(rng, order, "for").rstrip(",")
    sentences.append(rng.choice(("It is {}.", "Delivery {}.", "Please send it {}.")).format(where))
    if order.day:
        ways = ("{} would be perfect.", "We need it {}.", "Is {} possible?", "{} works best.")
        way = rng.choice(ways)
        when = time(rng, order) if way.startswith("We") else order.day
        sentences.append(way.format(when[0].upper() + when[1:] if way.startswith("{") else when))
    if rng.random() < 0.3:
        sentences[1:] = reversed(sentences[1:])
    return " ".join(sentences)


def signed(rng: random.Random, order: Order) -> str:
    """`Please send three boxes of green tea for Lyon by Friday. Thanks, Maria`"""
    where = rng.choice((f"for {order.city}", f"for our place in {order.city}"))
    parts = [goods(rng, order), where, time(rng, order)]
    if rng.random() < 0.3:
        parts[1:] = reversed(parts[1:])
    body = joined(rng.choice((*TELLING, *WANTING)), *parts)
    return f"{body} {rng.choice(('Thanks', 'Best wishes', 'Many thanks', 'Yours', 'Cheers'))}, {order.name}"


PHRASINGS: tuple[Callable[[random.Random, Order], str], ...] = (
    asked,
    asked,
    wanted,
    time_first,
    note,
    place_first,
    introduced,
    needed,
    in_sentences,
    signed,
)

GREETINGS = (
    "Hi!",
    "Hello!",
    "Hi there!",
    "Good morning!",
    "Good evening.",
    "Hey!",
    "Good day.",
    "Hello again!",
)


SMALL_TALK = (
    "Hope you are well.",
    "Thanks for the quick help last time.",
    "The weather is awful here.",
    "What a lovely week!",
    "Sorry for the short notice.",
    "Business is going well.",
    "Your shop is the best.",
)


def phrase(rng: random.Random, order: Order) -> str:
    """Phrase an order in one of many ways, with or without greeting and small talk."""
    text = rng.choice(PHRASINGS)(rng, order)
    before = [rng.choice(GREETINGS)] if rng.random() < 0.3 else []
    if rng.random() < 0.2:
        before.append(rng.choice(SMALL_TALK))
    after = [rng.choice(SMALL_TALK)] if rng.random() < 0.15 and text[-1] in ".?!" else []
    return " ".join((*before, text, *after))


# --- the rows -------------------------------------------------------------------------------------------------------


def make_rows(seed: int = SEED) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Make the training and the held-out rows.

    Args:
        seed: Start of the random numbers; equal seeds give equal rows.

    Returns:
        Training rows and held-out rows, each `{"messages": [user, assistant]}`. No input and no record is in both.
    """
    rng = random.Random(seed)
    inputs: set[str] = set()
    records: set[str] = set()

    def row(order: Order) -> dict[str, object]:
        while (text := phrase(rng, order)) in inputs:
            pass
        inputs.add(text)
        turns = (("user", text), ("assistant", order.record()))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    train = []
    for _ in range(TRAIN_ROWS):
        order = draw_order(rng)
        records.add(order.record())
        train.append(row(order))
    held_out: list[dict[str, object]] = []
    while len(held_out) < HELD_OUT_ROWS:
        order = draw_order(rng)
        if order.record() not in records:
            held_out.append(row(order))
    return train, held_out


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description="Make the orders dataset.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train.jsonl", "heldout.jsonl"), make_rows(arguments.seed), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.out / name).write_text(text, encoding="utf-8")
        print(f"{arguments.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
