"""Prose without end for prompts: own sentences put together at random, so that no stretch repeats."""

from __future__ import annotations

import random


def phrases(text: str) -> list[str]:
    return text.split("|")


_WHO = phrases(
    "the ferryman|my aunt|a young surveyor|the second violin|our neighbour from the mill|the night nurse|"
    "an old cartographer|the committee|the boy with the kite|the baker|a retired judge|the lighthouse keeper|"
    "the stranger in the grey coat|a student of chemistry|the stationmaster|the last glassblower"
)
_DID = phrases(
    "carried {} across the frozen river|wrote a long letter about {}|asked twice for {}|"
    "could not explain {}|found {} behind the organ|sold {} for less than it was worth|"
    "kept {} in a drawer for eleven years|counted on {} more than was wise|drew {} from memory|"
    "argued with everyone about {}|returned {} without a word|repaired {} with wire and patience"
)
_WHAT = phrases(
    "a box of unlabelled keys|the map of the northern canal|three hundred pages of weather records|"
    "the broken barometer|a jar of sea water|the timetable for winter|a recipe in two languages|"
    "the smallest of the five bells|a lamp that burned blue|the plan for the new bridge|"
    "a notebook full of tide tables|the portrait nobody claimed|an orchard of forty trees"
)
_WHEN = phrases(
    "in the spring of that year|before the rain came|on the morning of the fair|after the harvest|"
    "while the others slept|as soon as the road was clear|during the long strike|some time in October|"
    "on the coldest night anyone remembered|when the mail boat was late"
)
_WHY = phrases(
    "because the old one had been lost|although nobody had asked for it|and that settled the matter|"
    "which surprised even those who knew the story|so that the children would understand|"
    "but the price of coal had doubled by then|and the town talked of little else for a week|"
    "since there was no other way to be sure|and the numbers, for once, agreed"
)


def prose(words: int, seed: int = 1) -> str:
    """At least ``words`` words, in paragraphs; the same for the same seed."""
    rng = random.Random(seed)
    paragraphs: list[str] = []
    count = 0
    while count < words:
        sentences = []
        for _ in range(rng.randint(3, 7)):
            parts = [rng.choice(_WHO), rng.choice(_DID).format(rng.choice(_WHAT))]
            if rng.random() < 0.6:
                parts.insert(0, rng.choice(_WHEN) + ",")
            end = f", {rng.choice(_WHY)}." if rng.random() < 0.7 else "."
            sentence = " ".join(parts) + end
            if rng.random() < 0.2:
                sentence = (
                    f"by {rng.randint(1790, 1990)}, {rng.randint(2, 9900)} people later said, {sentence}"
                )
            sentences.append(sentence[0].upper() + sentence[1:])
            count += sentence.count(" ") + 1
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)
