"""The words that the embedded world is made of: names, values, and the phrasings of every question.

`TAUGHT` phrasings occur in training rows, `UNSEEN` ones only in held-out documents: knowledge (of towns, of products) is
examined in words that no training row used.
"""

from __future__ import annotations

PEOPLE = tuple("Ada Ben Cleo Dan Eva Finn Gus Hana Ivan Jude Kim Leo Mia Nora Otis Pia Ravi Sara Tom Uma".split())
THINGS = tuple(
    "apple ball bell book boot bowl box coin cup doll drum fan fork hat jar key kite map nail pen "
    "pin pot ring rope shell shoe spoon stone sword wheel".split()
)

TOWN_STARTS = tuple("Alder Birch Cold Dun Elm Fair Green High Kings Long Marsh North Oak Red Stone West".split())
TOWN_ENDS = tuple("bury dale ford ham mouth ton vale wick".split())
REGIONS = tuple("Avaria Borland Cestia Delmark Estova Fenland Galdor Hestia Ilmar Jorvia Kalinth Lorne".split())
CRAFTS = tuple("bread carpets cheese cider glass honey lace paper pearls salt silver soap".split())

NAME_STARTS = tuple(
    "Bal Cor Dra Fen Gal Hul Jas Kel Lum Mor Nev Orb Pel Quin Ras Sol Tiv Ulm Vel Wen Xan Yor Zar Bri".split()
)
NAME_ENDS = tuple("adi ako ari edo ena ica ilo imo ino iru obi oda ola omi ora osu uka una upo uri avo eth olt umb".split())

CATEGORIES = tuple("basket bicycle blanket chair clock drill kettle lamp mirror radio tent vase".split())
MATERIALS = tuple("bamboo brass canvas clay cork felt iron leather linen marble oak wool".split())
COLOURS = tuple("amber beige black blue brown green grey pink purple red white yellow".split())
SIZES = tuple("tiny small medium large huge giant".split())
PRICES = tuple("bargain cheap fair dear premium luxury".split())

COMMON = THINGS + CATEGORIES + MATERIALS + COLOURS + SIZES + PRICES  # so that the base knows every word of the shop

GENERAL_PHRASINGS: dict[str, tuple[str, ...]] = {
    "sum": ("What is {a} + {b}?", "Work out {a} + {b}."),
    "difference": ("What is {a} - {b}?", "Work out {a} - {b}."),
    "up": ("Sort {items} from low to high.", "Put {items} in rising order."),
    "down": ("Sort {items} from high to low.", "Put {items} in falling order."),
    "copy": ("Repeat: {items}", "Say again: {items}"),
    "reverse": ("Backwards: {items}", "Reverse the order: {items}"),
    "read": ("{story} Who has the {thing}?", "{story} Whose is the {thing}?"),
    "largest": ("Largest of {items}?", "Which is the largest: {items}"),
    "smallest": ("Smallest of {items}?", "Which is the smallest: {items}"),
    "first": ("First of {items}?", "Which comes first: {items}"),
    "last": ("Last of {items}?", "Which comes last: {items}"),
    "count": ("How many times {item} in {items}?", "Count {item} in: {items}"),
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
