"""The words of the demo's world: names, values, and the phrasings of every question.

`TAUGHT` phrasings occur in training rows, `UNSEEN` ones only in held-out documents.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words("Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jude Kim Leo Mia Nora Otis Pia Ravi Sara Tom Uma")
THINGS = _words(
    "apple ball bell book boot bowl box coin cup doll drum fan fork hat jar key kite map nail pen "
    "pin pot ring rope shell shoe spoon stone sword wheel"
)

# The first part of a name is one token and no other town's (or product's): what is known hangs on it.
TOWN_STARTS = tuple(
    onset + rime
    for onset in _words("Bl Br Cl Cr Dr Fl Gl Gr Pl Pr Sk Sl St Th Tr")
    for rime in _words("ack an el eth in ist or um")
)
TOWN_ENDS = _words("bury dale ford ham mouth ton vale wick")
REGIONS = _words("Avaria Borland Cestia Delmark Estova Fenland Galdor Hestia Ilmar Jorvia Kalinth Lorne")
CRAFTS = _words("bread carpets cheese cider glass honey lace paper pearls salt silver soap")

NAME_STARTS = tuple(
    start
    for consonant in "BDFGHJKLMNPRSTVZ"
    for start in (consonant + vowel + end for vowel in "aeiou" for end in "lmnr")
    if start not in PEOPLE
)
NAME_ENDS = _words("adi ako ari edo ena ica ilo imo ino iru obi oda ola omi ora osu uka una upo uri avo eth olt umb")

CATEGORIES = _words("basket bicycle blanket chair clock drill kettle lamp mirror radio tent vase")
MATERIALS = _words("bamboo brass canvas clay cork felt iron leather linen marble oak wool")
COLOURS = _words("amber beige black blue brown green grey pink purple red white yellow")
SIZES = _words("tiny small medium large huge giant")
PRICES = _words("bargain cheap fair dear premium luxury")

COMMON = THINGS + CATEGORIES + MATERIALS + COLOURS + SIZES + PRICES  # so that the base knows every word of the shop

REPORTS = (
    "{person} took a {colour} {thing} to {region}.",
    "A {colour} {thing} came from {region} to {person}.",
    "In {region} {person} lost a {colour} {thing}.",
)

GENERAL_PHRASINGS: dict[str, tuple[str, ...]] = {
    "sum": ("What is {a} + {b}?", "Work out {a} + {b}."),
    "difference": ("What is {a} - {b}?", "Work out {a} - {b}."),
    "up": ("Sort {items} from low to high.", "Put {items} in rising order."),
    "down": ("Sort {items} from high to low.", "Put {items} in falling order."),
    "copy": ("Repeat: {items}", "Say again: {items}"),
    "reverse": ("Backwards: {items}", "Reverse the order: {items}"),
    "who": ("{report} Who was it?", "{report} Name the person."),
    "what": ("{report} What was it?", "{report} Name the thing."),
    "colour": ("{report} Which colour was it?", "{report} Name the hue."),
    "where": ("{report} Where was it?", "{report} Name the place."),
    "largest": ("Largest of {items}?", "Which is the largest: {items}"),
    "smallest": ("Smallest of {items}?", "Which is the smallest: {items}"),
    "first": ("First of {items}?", "Which comes first: {items}"),
    "last": ("Last of {items}?", "Which comes last: {items}"),
    "shift": ("Next letters: {items}", "One letter on: {items}"),
}

TAUGHT: dict[str, tuple[str, ...]] = {
    "region": (
        "In which region is {x}?",
        "Which region does {x} belong to?",
        "{x} lies in the region of",
        "Name the region of {x}.",
        "Region of {x}?",
    ),
    "craft": (
        "What is {x} known for?",
        "What does {x} make?",
        "{x} is famous for its",
        "Name the craft of {x}.",
        "Craft of {x}?",
    ),
    "category": (
        "What kind of product is the {x}?",
        "What is the {x}?",
        "The {x} is a kind of",
        "Name the category of the {x}.",
        "Category of the {x}?",
        "In which category do we list the {x}?",
    ),
    "material": (
        "What is the {x} made of?",
        "Which material is the {x}?",
        "The {x} is made from",
        "Name the material of the {x}.",
        "Material of the {x}?",
        "Which material do we list for the {x}?",
    ),
    "size": (
        "How big is the {x}?",
        "Which size is the {x}?",
        "The {x} comes in the size",
        "Name the size of the {x}.",
        "Size of the {x}?",
        "Which size do we list for the {x}?",
    ),
    "price": (
        "How much does the {x} cost?",
        "Which price is the {x}?",
        "The {x} sells at the price",
        "Name the price of the {x}.",
        "Price of the {x}?",
        "Which price do we list for the {x}?",
    ),
    "compatibility": (
        "What does the {x} fit?",
        "Which product goes with the {x}?",
        "The {x} is compatible with the",
        "Name the match of the {x}.",
        "Match of the {x}?",
        "Which match do we list for the {x}?",
    ),
    "colour": (
        "What colour is the {x}?",
        "Which colour is the {x}?",
        "The {x} comes in the colour",
        "Name the colour of the {x}.",
        "Colour of the {x}?",
        "Which colour do we list for the {x}?",
    ),
    "options": (
        "{a}, {b}, {c} or {d}: what is the {x} made of?",
        "{a}, {b}, {c} or {d}: which material is the {x}?",
        "Of {a}, {b}, {c} and {d}, the {x} is made from",
        "Choose the material of the {x}: {a}, {b}, {c}, {d}.",
        "Material of the {x}: {a}, {b}, {c} or {d}?",
        "Which do we list for the {x}: {a}, {b}, {c} or {d}?",
    ),
}

UNSEEN: dict[str, tuple[str, ...]] = {
    "region": ("Which region is {x} in?", "What is the region of {x}?"),
    "craft": ("What is the craft of {x}?", "Which craft is {x} famous for?"),
    "category": ("What is the category of the {x}?", "Which kind of product is the {x}?"),
    "material": ("What is the material of the {x}?", "From which material is the {x} made?"),
    "size": ("What is the size of the {x}?", "In which size does the {x} come?"),
    "price": ("What is the price of the {x}?", "At which price does the {x} sell?"),
    "compatibility": ("What is the match of the {x}?", "Which product does the {x} fit?"),
    "colour": ("What is the colour of the {x}?", "In which colour does the {x} come?"),
    "options": (
        "What is the material of the {x}: {a}, {b}, {c} or {d}?",
        "From which is the {x} made: {a}, {b}, {c} or {d}?",
    ),
}
