"""Own the pretraining text of the tiny base model: seeded grammars for stories, notes, questions, tables and chat.

It must not know the orders example (its record format, its rows), nor how the text is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from examples.tiny_base.extraction import Passage, described_table, letter, people, shopping_note
from examples.tiny_base.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    CONTAINERS,
    DAYS,
    FEELINGS,
    JOBS,
    MONTHS,
    NAMES,
    PLACES,
    SIZES,
    STUFF,
    THINGS,
    WEATHER,
    article,
    counted,
    invented_word,
    number_in_words,
    plural,
)

# The tokenizer's end of a text; documents in one row are separated by it.
END = "<|endoftext|>"
Document = Callable[[random.Random], str]


def chat(*turns: str) -> str:
    """Write turns of user and assistant, the user first, in the chat format."""
    roles = ("user", "assistant")
    return "".join(f"<|im_start|>{roles[i % 2]}\n{turn}<|im_end|>\n" for i, turn in enumerate(turns)).rstrip(
        "\n"
    )


def story(rng: random.Random) -> str:
    """A small story: somebody goes somewhere, finds something, and something comes of it."""
    hero, friend = rng.sample(NAMES, 2)
    place, other_place = rng.sample(PLACES, 2)
    thing = rng.choice(THINGS)
    looks = f"{rng.choice(SIZES)} {rng.choice(COLOURS)} {thing}"
    animal = rng.choice(ANIMALS)
    number = rng.randint(2, 12)
    day = rng.choice(DAYS)
    openings = (
        f"One {rng.choice(WEATHER)} {day}, {hero} went to the {place}.",
        f"{hero} was {article(rng.choice(JOBS))} in {rng.choice(CITIES)} and lived near the {place}.",
        f"It was {day} morning and {hero} felt {rng.choice(FEELINGS)}.",
        f"Once there was {article(rng.choice(JOBS))} called {hero}, who had {article(animal)}.",
        f"On {day} {hero} and {friend} walked from the {place} to the {other_place}.",
    )
    middles = (
        f"There {hero} found {article(looks)}.",
        f'"Have you seen my {thing}?" asked {friend}.',
        f"{friend} gave {hero} {number_in_words(number)} {plural(thing)}.",
        f"{hero} saw {article(animal)} with {article(looks)}.",
        f"They looked for the {thing} for {number} hours.",
        f"The {animal} was {rng.choice(FEELINGS)} because it was {rng.choice(WEATHER)}.",
        f"{hero} bought {article(rng.choice(CONTAINERS))} of {rng.choice(STUFF)} for {friend}.",
        f'"I need {article(thing)}," said {hero}. "I have one," said {friend}.',
    )
    endings = (
        f"In the end {hero} gave the {thing} to {friend}.",
        f"{hero} took the {thing} home and was {rng.choice(FEELINGS)}.",
        f"So {hero} and {friend} became friends.",
        f"The next day the {thing} was back at the {place}.",
        f"{friend} said thank you and went back to the {other_place}.",
    )
    return " ".join((rng.choice(openings), *rng.sample(middles, rng.randint(2, 4)), rng.choice(endings)))


def conversation(rng: random.Random) -> str:
    """Two people talk, each line with its speaker."""
    first, second = rng.sample(NAMES, 2)
    thing, other = rng.sample(THINGS, 2)
    day = rng.choice(DAYS)
    exchanges = (
        (f"Good morning, {second}. How are you?", f"I am {rng.choice(FEELINGS)}, thanks, {first}."),
        (f"Could you give me the {thing}, please?", f"Here is the {thing}. Do you want the {other} too?"),
        (f"Where is the {thing}?", f"The {thing} is in the {rng.choice(PLACES)}."),
        (f"When will you be in {rng.choice(CITIES)}?", f"I hope to be there on {day}, or the day after."),
        ("How is the weather?", f"It is {rng.choice(WEATHER)} and {rng.choice(WEATHER)} today."),
        (f"Sorry, I lost your {thing}.", f"That is fine, I have another {thing}."),
        (f"Would you like some {rng.choice(STUFF)}?", "Yes, please. That is very kind of you."),
        (f"Shall we meet on {day}?", f"Yes, {day} works for me. See you at the {rng.choice(PLACES)}."),
        (f"I have {rng.randint(2, 40)} {plural(thing)}.", f"I would rather have {article(other)}."),
    )
    lines = [
        f"{first}: {question}\n{second}: {answer}"
        for question, answer in rng.sample(exchanges, rng.randint(2, 4))
    ]
    return "\n".join(lines)


def numbers(rng: random.Random) -> str:
    """Numbers in words and digits: counting, sums, spelling."""
    lines = []
    for _ in range(rng.randint(3, 8)):
        a, b = rng.randint(0, 60), rng.randint(0, 20)
        noun = rng.choice((*THINGS, *CONTAINERS))
        word, other = number_in_words(a), number_in_words(b)
        ways = (
            f"{word} is {a}",
            f"{a} is written {word}",
            f"{word} {counted(a, noun)} = {a} {counted(a, noun)}",
            f"{a} {counted(a, noun)}: {word} {counted(a, noun)}",
            f"one {noun}, {number_in_words(b + 2)} {plural(noun)}",
            f"{plural(noun)} -> {noun}",
            f"{word} plus {other} is {number_in_words(a + b)}",
            f"{a} + {b} = {a + b}",
            f"after {word} comes {number_in_words(a + 1)}",
            f"a dozen {plural(noun)} are 12 {plural(noun)}, half a dozen are 6, two dozen are 24",
            f"a couple of {plural(noun)} are 2 {plural(noun)}, {article(noun)} is 1 {noun}",
        )
        lines.append(rng.choice(ways))
    return "\n".join(lines)


def some_words(rng: random.Random) -> str:
    """One to three words: real ones, names or invented ones."""
    kinds: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(THINGS),
        lambda: rng.choice(STUFF),
        lambda: rng.choice(NAMES),
        lambda: rng.choice(CITIES),
        lambda: invented_word(rng),
        lambda: invented_word(rng).capitalize(),
        lambda: f"{invented_word(rng)} {invented_word(rng)}",
        lambda: f"{rng.choice(COLOURS)} {rng.choice(THINGS)}",
        lambda: str(rng.randint(1, 300)),
    )
    return rng.choice(kinds)()


def copies(rng: random.Random) -> str:
    """Say things again: after an arrow, on the next line, by position in a list."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        words = [some_words(rng) for _ in range(rng.randint(2, 6))]
        listed = ", ".join(words)
        place = rng.choice(("first", "last"))
        ways = (
            f"{listed} -> {listed}",
            f"copy: {listed}\ncopy: {listed}",
            f"{place} of {listed}: {words[0 if place == 'first' else -1]}",
            f"after {words[0]} in {listed}: {words[1]}",
            f"backwards: {listed} -> {', '.join(reversed(words))}",
            f"{listed}\n" + "\n".join(f"{i + 1}. {word}" for i, word in enumerate(words)),
        )
        lines.append(rng.choice(ways))
    return "\n".join(lines)


def echo(rng: random.Random) -> str:
    """The same few words again and again: nothing but copying makes them likely."""

    def letters() -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 6)))

    def word() -> str:
        kinds = (
            lambda: some_words(rng),
            letters,
            lambda: letters().capitalize(),
            lambda: invented_word(rng) + letters(),
        )
        return rng.choice(kinds)()

    words = [word() for _ in range(rng.randint(2, 8))]
    between = rng.choice((" ", " ", " ", ", "))
    return between.join(words * rng.choice((3, 4, 6)))


def lookup(rng: random.Random) -> str:
    """A small table of invented keys and values, then questions on it."""
    keys = list(dict.fromkeys(invented_word(rng) for _ in range(rng.randint(3, 7))))
    table = {key: some_words(rng) for key in keys}
    mark = rng.choice((":", " =", " is"))
    rows = "\n".join(f"{key}{mark} {value}" for key, value in table.items())
    asked = rng.sample(keys, len(keys))
    return rows + "\n\n" + "\n".join(f"{key}? {table[key]}" for key in asked)


def instruction(rng: random.Random) -> str:
    """Chat turns with a small task whose answer is in the question."""
    words = [some_words(rng) for _ in range(rng.randint(2, 5))]
    listed = ", ".join(words)
    number = rng.randint(0, 99)
    noun = rng.choice((*THINGS, *CONTAINERS))
    name, city, day = rng.choice(NAMES), rng.choice(CITIES), rng.choice(DAYS)
    thing = rng.choice(THINGS)
    tasks = (
        (f"Repeat: {listed}", listed),
        (f"Please say this again: {listed}", listed),
        (f"What is the first of these? {listed}", words[0]),
        (f"What is the last of these? {listed}", words[-1]),
        (f"Write as a number: {number_in_words(number)}", str(number)),
        (f"Write in words: {number}", number_in_words(number)),
        (f"What is one of many {plural(noun)}?", noun),
        (f"What are many of one {noun}?", plural(noun)),
        (f"My name is {name}. What is my name?", f"Your name is {name}."),
        (f"{name} lives in {city}. Where does {name} live?", f"In {city}."),
        (f"I lost my {thing} on {day}. What did I lose?", f"Your {thing}."),
        (f"I lost my {thing} on {day}. When was that?", f"On {day}."),
        (f"Hello, I am {name} from {city}.", f"Hello {name}, how is the weather in {city}?"),
        (f"List these: {listed}", "\n".join(f"- {word}" for word in words)),
    )
    turns = [turn for task in rng.sample(tasks, rng.randint(1, 3)) for turn in task]
    return chat(*turns)


def facts(rng: random.Random) -> str:
    """Plain statements about the order of days, months, colours and things."""
    day, month = rng.randrange(7), rng.randrange(12)
    lines = [
        f"After {DAYS[day]} comes {DAYS[(day + 1) % 7]}.",
        f"Before {DAYS[day]} comes {DAYS[day - 1]}.",
        f"After {MONTHS[month]} comes {MONTHS[(month + 1) % 12]}.",
        f"A {rng.choice(COLOURS)} {rng.choice(THINGS)} is not {rng.choice(COLOURS)}.",
        f"{rng.choice(STUFF).capitalize()} comes in {plural(rng.choice(CONTAINERS))}.",
        f"{rng.choice(CITIES)} is a city. {rng.choice(NAMES)} is a name.",
        f"{article(rng.choice(ANIMALS)).capitalize()} is an animal.",
        f"If today is {DAYS[day]}, tomorrow is {DAYS[(day + 1) % 7]}.",
    ]
    return " ".join(rng.sample(lines, rng.randint(2, 4)))


def asked(passage: Callable[[random.Random], Passage]) -> Document:
    """Turn a maker of passages into a maker of documents that ask some of its questions: as chat or as plain text."""

    def write(rng: random.Random) -> str:
        made = passage(rng)
        questions = made.questions[: rng.randint(1, 4)]
        first, *others = questions
        opening = [f"{made.text}\n{first[0]}", f"{first[0]}\n{made.text}"][rng.random() < 0.3].strip()
        if rng.random() < 0.6:
            return chat(opening, first[1], *(turn for question in others for turn in question))
        return "\n".join((opening, first[1], *(f"{question}\n{answer}" for question, answer in others)))

    return write


# Kind of document -> how often it is drawn. Most weight is on what makes a model read: find, copy, rewrite.
MIXTURE: dict[Document, float] = {
    story: 1.0,
    conversation: 0.8,
    numbers: 1.2,
    facts: 0.3,
    echo: 2.0,
    copies: 1.6,
    lookup: 1.2,
    instruction: 1.5,
    asked(described_table): 3.0,
    asked(people): 1.5,
    asked(letter): 2.0,
    asked(shopping_note): 1.5,
}


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end; equal seeds give equal documents."""
    rng = random.Random(seed)
    kinds, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        yield rng.choices(kinds, weights)[0](rng)
