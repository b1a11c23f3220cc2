"""Own the pretraining documents that ask for what a text says: tables of books and pets, letters, people, notes.

It must not know the orders example: its record format and its domain (who ordered what) do not occur here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.tiny_base.words import (
    ANIMALS,
    CITIES,
    COLOURS,
    CONTAINERS,
    DAYS,
    JOBS,
    MONTHS,
    NAMES,
    PLACES,
    STUFF,
    THINGS,
    WEATHER,
    article,
    counted,
    invented_word,
    number_in_words,
    plural,
)

Fields = dict[str, str]


@dataclass(frozen=True)
class Passage:
    """A text, and questions on it with answers that can be read off it."""

    text: str
    questions: list[tuple[str, str]]


def person(rng: random.Random) -> str:
    """A name: mostly a real one, now and then an invented one or two words."""
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(NAMES)
    first = rng.choice(NAMES) if chance < 0.75 else invented_word(rng).capitalize()
    return first if chance > 0.85 else f"{first} {invented_word(rng).capitalize()}"


def town(rng: random.Random) -> str:
    """A town: half of them real, half invented."""
    return rng.choice(CITIES) if rng.random() < 0.5 else invented_word(rng).capitalize()


def object_name(rng: random.Random) -> str:
    """A thing of one or two words, real or invented."""
    kinds: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(THINGS),
        lambda: f"{rng.choice(COLOURS)} {rng.choice(THINGS)}",
        lambda: f"{invented_word(rng)} {rng.choice(THINGS)}",
        lambda: invented_word(rng),
        lambda: f"{invented_word(rng)} {invented_word(rng)}",
    )
    return rng.choice(kinds)()


def number_phrase(rng: random.Random, number: int) -> str:
    """A number in digits or in words."""
    return str(number) if number > 99 or rng.random() < 0.5 else number_in_words(number)


def book(rng: random.Random) -> tuple[list[str], Fields]:
    """A book: sentences in any order and what they say."""
    title = f"The {object_name(rng).title()}"
    author, pages, year = person(rng), rng.randint(20, 480), rng.randint(1900, 2020)
    colour = rng.choice(COLOURS)
    sentences = [
        f"{title} was written by {author}.",
        rng.choice((f"It has {pages} pages.", f"There are {pages} pages in it.")),
        rng.choice((f"It came out in {year}.", f"It is from {year}.")),
        f"Its cover is {colour}.",
    ]
    fields = {"title": title, "author": author, "pages": str(pages), "year": str(year), "colour": colour}
    return sentences, fields


def pet(rng: random.Random) -> tuple[list[str], Fields]:
    """A pet, its owner, age and colour."""
    pet_name, owner, animal = person(rng), person(rng), rng.choice(ANIMALS)
    age, colour = rng.randint(1, 20), rng.choice(COLOURS)
    years = f"{number_phrase(rng, age)} {counted(age, 'year')}"
    sentences = [
        rng.choice(
            (
                f"{pet_name} is {article(colour)} {animal}.",
                f"The {colour} {animal} is called {pet_name}.",
            )
        ),
        rng.choice(
            (f"It belongs to {owner}.", f"{owner} is very proud of it.", f"{owner} takes care of it.")
        ),
        rng.choice((f"It is {years} old.", f"It was born {years} ago.")),
    ]
    return sentences, {"pet": pet_name, "animal": animal, "owner": owner, "age": str(age), "colour": colour}


def trip(rng: random.Random) -> tuple[list[str], Fields]:
    """A trip of somebody from one town to another."""
    traveller, start, goal, day = person(rng), town(rng), town(rng), rng.choice(DAYS)
    hours = rng.randint(1, 30)
    vehicle = rng.choice(("train", "bus", "boat", "bicycle", "plane", "car"))
    sentences = [
        rng.choice(
            (
                f"{traveller} goes from {start} to {goal} by {vehicle}.",
                f"By {vehicle} {traveller} travels to {goal}, coming from {start}.",
                f"From {start}, {traveller} takes a {vehicle} to {goal}.",
            )
        ),
        rng.choice((f"The trip starts on {day}.", f"It is planned for {day}.", f"{day} is the day.")),
        f"It takes {number_phrase(rng, hours)} {counted(hours, 'hour')}.",
    ]
    return sentences, {
        "who": traveller,
        "from": start,
        "to": goal,
        "by": vehicle,
        "day": day,
        "hours": str(hours),
    }


def weather(rng: random.Random) -> tuple[list[str], Fields]:
    """The weather of a town on a day."""
    place, day, sky, degrees = town(rng), rng.choice(DAYS), rng.choice(WEATHER), rng.randint(1, 38)
    sentences = [
        rng.choice((f"In {place} it will be {sky} on {day}.", f"On {day} expect {sky} weather in {place}.")),
        rng.choice(
            (f"It gets up to {number_phrase(rng, degrees)} degrees.", f"We measure {degrees} degrees.")
        ),
    ]
    return sentences, {"town": place, "day": day, "weather": sky, "degrees": str(degrees)}


def find(rng: random.Random) -> tuple[list[str], Fields]:
    """Something lost or found: what, how many, by whom, where."""
    finder, thing, place, town_name = person(rng), object_name(rng), rng.choice(PLACES), town(rng)
    number = rng.choice((1, 1, 2, 3, 4, 5, 6, rng.randint(7, 40)))
    many = article(thing) if number == 1 else f"{number_phrase(rng, number)} {plural(thing)}"
    month = rng.choice(MONTHS)
    sentences = [
        rng.choice(
            (
                f"{finder} found {many} at the {place} in {town_name}.",
                f"At the {place} in {town_name}, {finder} lost {many}.",
                f"{many.capitalize()} was seen by {finder} near the {place} of {town_name}.",
            )
        ),
        rng.choice((f"That was in {month}.", f"It happened last {month}.")),
    ]
    fields = {"thing": thing, "count": str(number), "person": finder, "place": place, "town": town_name}
    return sentences, fields | {"month": month}


def recipe(rng: random.Random) -> tuple[list[str], Fields]:
    """A dish and what goes into it."""
    dish = f"{invented_word(rng)} {rng.choice(('soup', 'cake', 'bread', 'salad', 'pie'))}"
    first, second = rng.sample(STUFF, 2)
    a, b, minutes = rng.randint(1, 12), rng.randint(1, 12), rng.randint(5, 90)
    measure, other = rng.choice(CONTAINERS), rng.choice(CONTAINERS)
    sentences = [
        f"For {dish} take {number_phrase(rng, a)} {counted(a, measure)} of {first}"
        f" and {number_phrase(rng, b)} {counted(b, other)} of {second}.",
        rng.choice(
            (f"It is ready after {minutes} minutes.", f"Cook it for {number_phrase(rng, minutes)} minutes.")
        ),
    ]
    fields = {"dish": dish, "first": first, "first amount": f"{a} {measure}", "second": second}
    return sentences, fields | {"second amount": f"{b} {other}", "minutes": str(minutes)}


DOMAINS = (book, pet, trip, weather, find, recipe)
SMALL_TALK = (
    "I thought you would like to know.",
    "That is all for now.",
    "Listen to this.",
    "What a day!",
    "It was in the paper.",
    "Nobody knows why.",
    "I heard it from a friend.",
)


def described_table(rng: random.Random) -> Passage:
    """A text, the table of what it says, and parts of that table in the order asked for."""
    sentences, fields = rng.choice(DOMAINS)(rng)
    parts = sentences[:1] + rng.sample(sentences[1:], len(sentences) - 1)
    if rng.random() < 0.3:
        parts.insert(rng.randint(0, len(parts)), rng.choice(SMALL_TALK))
    text = " ".join(parts)
    mark, bullet = rng.choice(((": ", ""), (": ", "- "), (" = ", ""), (" is ", "the ")))

    def table(keys: list[str]) -> str:
        return "\n".join(f"{bullet}{key}{mark}{fields[key]}" for key in keys)

    keys = list(fields)
    if rng.random() < 0.1:
        return Passage(table(keys), [("Write this out.", text)])
    some, others = (rng.sample(keys, rng.randint(1, len(keys))) for _ in range(2))
    one = rng.choice(keys)
    verb = rng.choice(("Find", "Give", "List"))
    whole = (rng.choice(("", "Write it as a table.", "What does this say?")), table(keys))
    questions = [
        (f"{verb} {', '.join(some)}.", table(some)),
        (f"{verb} {', '.join(others)}.", table(others)),
        (f"{one}?", fields[one]),
    ]
    return Passage(text, [whole, *questions] if rng.random() < 0.6 else [questions[0], whole, *questions[1:]])


def people(rng: random.Random) -> Passage:
    """Facts about some people, each with its question."""
    sentences, questions = [], []
    for who in [person(rng) for _ in range(rng.randint(2, 4))]:
        home, job, thing = town(rng), rng.choice(JOBS), object_name(rng)
        number = rng.randint(2, 40)
        several = counted(number, thing)
        ways = (
            (f"{who} lives in {home}.", f"Where does {who} live?", home),
            (f"{who} is {article(job)}.", f"What does {who} do?", job),
            (
                f"{who} has {number_phrase(rng, number)} {several}.",
                f"How many {several} has {who}?",
                str(number),
            ),
            (f"{who} likes the {thing}.", f"What does {who} like?", f"the {thing}"),
            (f"The {job} in {home} is called {who}.", f"Who is the {job} in {home}?", who),
            (f"{who} comes on {(day := rng.choice(DAYS))}.", f"When does {who} come?", day),
        )
        for sentence, question, answer in rng.sample(ways, rng.randint(1, 2)):
            sentences.append(sentence)
            questions.append((question, answer))
    rng.shuffle(sentences)
    rng.shuffle(questions)
    return Passage(" ".join(sentences), questions)


def letter(rng: random.Random) -> Passage:
    """A short letter and questions on who wrote it, to whom, when and where they meet."""
    sender, receiver, home, day = person(rng), person(rng), town(rng), rng.choice(DAYS)
    thing, place, number = object_name(rng), rng.choice(PLACES), rng.randint(2, 30)
    hello = rng.choice(("Dear", "Hello", "Hi"))
    bye = rng.choice(("Best wishes", "Yours", "Thanks", "See you", "Love"))
    body = [
        rng.choice((f"I am in {home} now.", f"Greetings from {home}!", f"I came to {home} by train.")),
        rng.choice((f"Let us meet on {day} at the {place}.", f"Can you come to the {place} on {day}?")),
        rng.choice((f"Please bring the {thing}.", f"I hope you still have the {thing}.")),
        f"We are {number_phrase(rng, number)} people.",
        rng.choice(SMALL_TALK),
    ]
    questions = [
        ("Who wrote this?", sender),
        ("Who is this for?", receiver),
        ("Where is the writer?", home),
        ("When do they meet?", day),
        ("Where do they meet?", f"at the {place}"),
        ("What is it about?", f"the {thing}"),
        ("How many are they?", str(number)),
    ]
    text = f"{hello} {receiver}, {' '.join(rng.sample(body, len(body)))} {bye}, {sender}"
    return Passage(text, rng.sample(questions, len(questions)))


def shopping_note(rng: random.Random) -> Passage:
    """A note of things to buy, the same as a list with digits, and questions on single lines of it."""
    said, listed, questions = [], [], []
    for _ in range(rng.randint(2, 4)):
        number = rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12, rng.randint(2, 60)))
        holder = rng.choice(CONTAINERS)
        what = rng.choice(STUFF) if rng.random() < 0.6 else f"{invented_word(rng)} {rng.choice(STUFF)}"
        loose = {1: article(holder), 2: f"a couple of {plural(holder)}", 6: f"half a dozen {plural(holder)}"}
        loose |= {12: f"a dozen {plural(holder)}", 24: f"two dozen {plural(holder)}"}
        exact = f"{number_phrase(rng, number)} {counted(number, holder)}"
        said.append(f"{loose.get(number, exact) if rng.random() < 0.4 else exact} of {what}")
        listed.append(f"- {number} {counted(number, holder)} of {what}")
        questions += [
            (f"How much {what}?", f"{number} {counted(number, holder)}"),
            (f"{what} in what?", holder),
        ]
    opening = rng.choice(
        ("We still need", "Buy", "On the list are", "Do not forget", "In the cupboard there are")
    )
    rng.shuffle(questions)
    whole = ("Write it as a list.", "\n".join(listed))
    return Passage(f"{opening} {', '.join(said[:-1])} and {said[-1]}.", [whole, *questions])
