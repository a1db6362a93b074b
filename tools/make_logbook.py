"""Writes the long text of the ready suite `citation`: a logbook of numbered entries, one of which answers the question.

    python tools/make_logbook.py            # the text as it is in the package
    python tools/make_logbook.py 400        # a longer one, for models with a larger context

The same number of entries gives the same text on each machine.
"""

from __future__ import annotations

import random
import sys

ENTRIES = 70
MONTHS = ("January", "February", "March", "April", "May", "June")
FACT = "The firm of Halvorsen delivered the new pump of the east basin; the old one had run for nineteen years."
OPENINGS = (
    "Wind from the {wind}, {force}.", "Calm until noon, then {force} from the {wind}.", "Fog until {hour}.",
    "Rain since {hour}, wind {wind}.", "Clear and cold, {force} from the {wind}.",
)  # fmt: skip
EVENTS = (
    "The {ship} came in at {hour} with {count} crates of {cargo} and left again before dark.",
    "The {ship} asked for a place at pier {pier}; it got one after the {other} had gone out.",
    "{person} painted the railing of pier {pier}, which took {count} minutes longer than planned.",
    "{person} counted {count} crates of {cargo} in shed {pier} and found the list correct.",
    "The crane at pier {pier} stood still from {hour} on because of the wind.",
    "{count} visitors walked over pier {pier}; {person} showed them the signal mast.",
    "A loose plank on pier {pier} was nailed down by {person}.",
    "The {ship} took {count} litres of water and paid in cash.",
    "{person} cleaned the lamp on the mole and wrote down the oil that was left.",
    "The pump of the west basin was greased; it runs without noise.",
    "{person} measured the depth at pier {pier}: {depth} metres at low water.",
    "The {ship} lost a fender at pier {pier}; {person} fished it out with a hook.",
    "A letter about the {other} was sent to its owner, who had not paid for pier {pier}.",
)
WORDS = {
    "wind": ("north", "north-west", "west", "south-west", "south", "east"),
    "force": ("a light breeze", "a fresh breeze", "strong", "hardly any wind"),
    "ship": ("Marit", "Blue Heron", "Two Sisters", "Anna Teresa", "Petrel", "Old Corner"),
    "other": ("Dunlin", "Star of Hove", "Katinka", "Long Morning"),
    "person": ("Tove", "Mr Abara", "young Silas", "Ms Duarte", "the harbour master"),
    "cargo": ("apples", "roof tiles", "dried fish", "paper", "lamp oil", "nails"),
}


def entry(rng: random.Random) -> str:
    """The sentences of one day."""

    def filled(template: str) -> str:
        values = {name: rng.choice(choices) for name, choices in WORDS.items()}
        values |= {"hour": f"{rng.randint(6, 18)}:{rng.choice(('00', '15', '30', '45'))}", "pier": str(rng.randint(1, 5))}
        text = template.format(**values, count=rng.randint(12, 90), depth=f"{rng.uniform(2, 6):.1f}")
        return text[0].upper() + text[1:]

    return " ".join([filled(rng.choice(OPENINGS)), *(filled(e) for e in rng.sample(EVENTS, 2))])


def logbook(entries: int = ENTRIES) -> str:
    """Question, numbered entries, question again; the fact stands at two thirds.

    >>> text = logbook(6)
    >>> text.count("Halvorsen"), text.splitlines()[5].endswith(FACT), text.splitlines()[6].startswith("[5] 13 January")
    (1, True, True)
    """
    rng = random.Random(entries)
    ask = "Which firm delivered the new pump of the east basin? Answer in one sentence, with the number of the entry in brackets."
    lines = [f"This is the logbook of a small harbour. {ask}", ""]
    spot = entries * 2 // 3
    for number in range(1, entries + 1):
        day = (number - 1) * 3
        when = f"{day % 28 + 1} {MONTHS[day // 28 % len(MONTHS)]}"
        said = entry(rng)
        lines.append(f"[{number}] {when}. {said}" + (f" {FACT}" if number == spot else ""))
    return "\n".join([*lines, "", ask, ""])


if __name__ == "__main__":
    print(logbook(int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES), end="")
