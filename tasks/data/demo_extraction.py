"""The demo's own data: customers' messages in, one line of JSON out, generated with Faker.

Each part of the data (train, validation, test) has templates, greetings, asides, sign-offs, names, products and
dates of its own: what is measured is extraction from unseen wording, not recall. Closed sets (the four intents,
quantities, the ways to write a date) are shared, since they are what there is to learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any

from faker import Faker

from tasks.data.demo_wording import ASIDES, ATTRIBUTES, GREETINGS, ITEMS, SIGN_OFFS, TEMPLATES

ROWS: Mapping[str, int] = {"train": 3000, "validation": 64, "test": 100}
SHARES: Mapping[str, float] = {"train": 0.8, "validation": 0.08, "test": 0.12}
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
DATE_STYLES = ("{day} {month}", "{month} {day}", "{month} {day}{th}", "{day}{th} of {month}", "{day}{th} {month}")


@dataclass(frozen=True)
class Pool:
    """What the rows of one part are made of; no two pools share an entry."""

    templates: Sequence[tuple[str, str]]
    """Intent and text; `[…]` may be left out, and a field left out with it is null."""
    greetings: Sequence[str]
    asides: Sequence[str]
    """Sentences with nothing to extract."""
    sign_offs: Sequence[str]
    attributes: Sequence[str]
    """Colours, materials and the like, put before an item."""
    items: Sequence[str]
    first_names: Sequence[str]
    last_names: Sequence[str]
    dates: Sequence[date]


def generate(directory: Path, seed: int) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl: rows of `messages`, a user's and an assistant's.

    What is to be done belongs into `chat.system`, so that whoever chats with the model types the message alone. The
    same seed and Faker version give the same bytes.

    Args:
        directory: existing directory.
        seed: rules everything that is random.
    """
    for part, pool in pools(seed).items():
        random = Random(f"{seed}-{part}")  # noqa: S311, no secret
        rows: dict[str, str] = {}
        while len(rows) < ROWS[part]:
            message, fields = compose(pool, random)
            rows.setdefault(message, json.dumps(fields, separators=(",", ":")))
        lines = (
            json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
            for prompt, answer in rows.items()
        )
        (directory / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def pools(seed: int) -> dict[str, Pool]:
    """Divide all values among the three parts; the texts are divided in `demo_wording` already."""
    fake = Faker(["en_US", "en_GB"])
    fake.seed_instance(seed)
    random = Random(seed)  # noqa: S311, no secret
    first_names = {fake.first_name() for _ in range(3000)}
    last_names = {fake.last_name() for _ in range(3000)}
    draws = {
        "first_names": _divided(first_names, random),
        "last_names": _divided(last_names - first_names, random),
        "dates": _divided({date(2025, 1, 1) + timedelta(days) for days in range(365)}, random),
    }
    return {
        part: Pool(
            templates=[(intent, text) for intent, texts in TEMPLATES[part].items() for text in texts],
            greetings=GREETINGS[part],
            asides=ASIDES[part],
            sign_offs=SIGN_OFFS[part],
            attributes=ATTRIBUTES[part],
            items=ITEMS[part],
            **{name: values[part] for name, values in draws.items()},
        )
        for part in ROWS
    }


def compose(pool: Pool, random: Random) -> tuple[str, dict[str, str | int | None]]:
    """Make one message and what is to be extracted from it, intent first, then name, item, quantity and date."""
    intent, template = random.choice(pool.templates)
    template = re.sub(r"\[(.*?)\]", lambda part: part[1] if random.random() < 0.8 else "", template)
    template = template[0].upper() + template[1:]
    day, item = random.choice(pool.dates), random.choice(pool.items)
    if random.random() < 0.7:
        item = f"{random.choice(pool.attributes)} {item}"
    quantity, goods = _goods(item, random)
    values = {
        "name": f"{random.choice(pool.first_names)} {random.choice(pool.last_names)}",
        "goods": goods,
        "date": _written(day, random),
    }
    message = template if "{name}" in template else f"{template}{random.choice(pool.sign_offs)}"
    if random.random() < 0.4:
        message = f"{random.choice(pool.asides)} {message}"
    if random.random() < 0.7:
        message = f"{random.choice(pool.greetings)}{message}"
    noise = {"number": str(random.randrange(1000, 99999)), "other": random.choice(pool.first_names)}
    fields: dict[str, str | int | None] = {
        "intent": intent,
        "name": values["name"],
        "item": item,
        "quantity": quantity,
        "date": f"{day.day} {day:%B}" if "{date}" in template else None,
    }
    return message.format(**values, **noise), fields


def _divided(values: set[Any], random: Random) -> dict[str, list[Any]]:
    """Shuffle the values and share them out by `SHARES`."""
    shuffled = sorted(values)  # the order of a set of strings differs from process to process
    random.shuffle(shuffled)
    divided, start = {}, 0.0
    for part, share in SHARES.items():
        divided[part] = shuffled[round(start * len(shuffled)) : round((start + share) * len(shuffled))]
        start += share
    return divided


def _goods(item: str, random: Random) -> tuple[int, str]:
    """A quantity, and how a message says that many of the item."""
    if random.random() < 0.15:
        return 1, f"{'an' if item[0] in 'aeiou' else 'a'} {item}"
    quantity = random.randrange(2, 61)
    if random.random() < 0.3:
        quantity = random.randrange(2, 13)
        return quantity, f"{NUMBER_WORDS[quantity - 2]} {item}s"
    return quantity, f"{quantity} {item}s"


def _written(day: date, random: Random) -> str:
    th = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return random.choice(DATE_STYLES).format(day=day.day, month=f"{day:%B}", th=th)
