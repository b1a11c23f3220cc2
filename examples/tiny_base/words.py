"""Own the word lists and the small grammar (numbers in words, plurals) that the example texts are made of.

It must not know what is written with them: neither the pretraining corpus nor the orders.
"""

from __future__ import annotations

import random

NAMES = (
    "Ada Adam Agnes Albert Alex Alice Amir Amy Andrew Anita Anna Arthur Astrid Ben Bella Bruno Carla Carmen "
    "Chen Chloe Clara Daniel Daria David Diana Dora Edgar Edith Elena Eli Ella Emil Emma Erik Eva Felix Fiona "
    "Frank Freya Gabriel George Grace Greta Hana Hannah Hassan Helen Henry Hugo Ida Igor Ines Iris Isaac Ivan "
    "Jack James Jana Jasmin John Jonas Julia Kai Karim Karl Kate Kenji Lara Laura Lea Leo Lily Lina Linda Louis "
    "Lucas Lucy Luis Maja Marco Maria Marta Martin Max Mei Mia Mila Nadia Nina Noah Nora Olga Oliver Omar Oscar "
    "Paul Paula Pedro Peter Petra Rafael Rita Robert Rosa Ruth Sam Sara Sasha Simon Sofia Sonia Stella Susan Tara "
    "Theo Thomas Tim Tom Vera Victor Viola Walter Wendy Yara Yusuf Zoe"
).split()

CITIES = (
    "Ankara, Athens, Bath, Bergen, Berlin, Bern, Bologna, Boston, Bristol, Brno, Cairo, Chicago, Cork, Dallas, "
    "Denver, Dublin, Florence, Geneva, Genoa, Ghent, Glasgow, Graz, Hamburg, Helsinki, Leeds, Leipzig, Lima, "
    "Lisbon, London, Lyon, Madrid, Malmo, Manila, Milan, Munich, Nairobi, Naples, New York, Nice, Osaka, Oslo, "
    "Paris, Perth, Porto, Prague, Quito, Riga, Rome, San Diego, Santiago, Seoul, Seville, Sofia, Split, Sydney, "
    "Tampere, Tokyo, Toronto, Turin, Vienna, Warsaw, York, Zagreb, Zurich"
).split(", ")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = ("January February March April May June July August September October November December").split()

COLOURS = "red blue green yellow black white brown grey orange purple pink silver golden".split()

THINGS = (
    "apple, ball, basket, bell, bicycle, blanket, boat, book, bottle, bowl, box, bread roll, brush, bucket, button, "
    "camera, candle, chair, clock, coat, cup, door, drum, envelope, feather, flag, flower, fork, glass, glove, "
    "guitar, hammer, hat, jacket, jar, kettle, key, kite, ladder, lamp, lemon, letter, map, mirror, mug, needle, "
    "notebook, onion, orange, paint brush, paper bag, pear, pen, pencil, picture, pillow, plate, potato, radio, "
    "ribbon, ring, rope, ruler, scarf, shell, shoe, spoon, stamp, stone, suitcase, table, tent, ticket, tin, "
    "tomato, tool box, towel, toy car, train ticket, tree, umbrella, violin, watch, wheel, whistle, window"
).split(", ")

STUFF = (
    "apple juice, bread, brown paper, butter, cheese, chocolate, cocoa, coffee, corn, cotton, cream, dark wood, "
    "dry grass, dust, fish, flour, fresh snow, fruit, glue, gold, grain, hay, honey, ice, ink, jam, milk, mud, "
    "oats, old paper, paint, pepper, plain rice, rain water, rice, salt, sand, silk, soap, soup, steel, sugar, tea, "
    "warm milk, water, wax, white paint, wine, wood, wool, yarn"
).split(", ")

CONTAINERS = (
    "bag, barrel, basket, bottle, bowl, box, bucket, bunch, can, carton, case, crate, cup, glass, jar, jug, kilo, "
    "litre, pack, packet, piece, pile, pot, roll, sack, sheet, tank, tin, tray, tube"
).split(", ")

ANIMALS = (
    "cat dog horse rabbit parrot goat sheep hen duck mouse fish turtle donkey pony hamster lizard owl cow fox bee"
).split()

JOBS = (
    "baker, teacher, doctor, painter, farmer, driver, cook, singer, writer, nurse, pilot, tailor, gardener, "
    "carpenter, librarian, dentist, plumber, waiter, shop owner, bus driver, engineer, fisherman"
).split(", ")

PLACES = (
    "park, market, station, library, school, garden, beach, kitchen, office, museum, bakery, harbour, forest, "
    "river, bridge, cafe, theatre, farm, hotel, shop, post office, square, village, hospital"
).split(", ")

FEELINGS = (
    "happy sad tired hungry proud angry calm curious worried surprised glad nervous bored cheerful".split()
)

WEATHER = "sunny rainy cloudy windy foggy snowy stormy cold warm hot mild dry wet".split()

SIZES = (
    "small big tiny huge long short heavy light old new round square soft broken clean dusty wooden".split()
)

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()

_SYLLABLE_STARTS = (
    "b c d f g h j k l l m m n n p r r s s t t v w z br ch dr gl gr kl pr sh sk st th tr".split()
)
_SYLLABLE_MIDDLES = "a a a e e e i i o o u ai ee ie oo ou".split()
_SYLLABLE_ENDS = ("", "", "", "", "", "", "", "l", "m", "n", "n", "r", "s", "t", "nd", "ck")


def number_in_words(number: int) -> str:
    """Spell a number from 0 to 99: 24 is `twenty-four`."""
    if not 0 <= number <= 99:
        raise ValueError(f"got {number}, expected 0 to 99")
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def plural(noun: str) -> str:
    """Return the regular plural of an English noun or of the last word of a noun phrase."""
    if noun.endswith(("s", "x", "ch", "sh", "tomato", "potato")):
        return noun + "es"
    if noun.endswith("knife"):
        return noun[:-2] + "ves"
    if noun.endswith(("y",)) and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def counted(number: int, noun: str) -> str:
    """Return the noun as it is written after this number: `box` after 1, `boxes` after any other."""
    return noun if number == 1 else plural(noun)


def article(phrase: str) -> str:
    """Put `a` or `an` before a phrase."""
    return f"{'an' if phrase[0] in 'aeiouAEIOU' else 'a'} {phrase}"


def invented_word(rng: random.Random) -> str:
    """Make up a pronounceable word of one to three syllables, so that copying cannot be done from memory."""
    syllables = rng.choice((1, 2, 2, 2, 3, 3))
    return "".join(
        rng.choice(_SYLLABLE_STARTS) + rng.choice(_SYLLABLE_MIDDLES) + rng.choice(_SYLLABLE_ENDS)
        for _ in range(syllables)
    )
