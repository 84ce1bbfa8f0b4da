"""Generated arithmetic text: word problems and plain sums with worked answers.

Every problem is a question and an answer that shows the calculation, in one of several templates. All numbers are
correct; everything follows from the seed.
"""

import random
from collections.abc import Callable

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kira", "Leo", "Mia", "Noah"]
THINGS = ["apples", "books", "coins", "pens", "stamps", "shells", "cards", "marbles", "tickets", "cookies", "stones"]
PLACES = ["shop", "garden", "school", "market", "library", "kitchen"]
PROBLEMS_PER_ROW = 5


def arithmetic_rows(count: int, seed: int) -> tuple[str, ...]:
    """Return `count` rows of `PROBLEMS_PER_ROW` problems each; no problem occurs twice in the whole result."""
    rng = random.Random(seed)
    seen: set[str] = set()
    rows = []
    for _ in range(count):
        problems: list[str] = []
        while len(problems) < PROBLEMS_PER_ROW:
            problem = rng.choice(TEMPLATES)(rng)
            if problem not in seen:
                seen.add(problem)
                problems.append(problem)
        rows.append("\n\n".join(problems))
    return tuple(rows)


def _gain(rng: random.Random) -> str:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 99), rng.randint(2, 99)
    verb = rng.choice(["finds", "buys", "is given"])
    return (
        f"Question: {name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have now?\n"
        f"Answer: {a} + {b} = {a + b}. {name} has {a + b} {thing}."
    )


def _loss(rng: random.Random) -> str:
    name, thing, b, rest = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 60), rng.randint(1, 60)
    verb = rng.choice(["loses", "sells", "gives away"])
    return (
        f"Question: {name} has {b + rest} {thing} and {verb} {b} of them. How many {thing} are left?\n"
        f"Answer: {b + rest} - {b} = {rest}. There are {rest} {thing} left."
    )


def _boxes(rng: random.Random) -> str:
    thing, place, a, b = rng.choice(THINGS), rng.choice(PLACES), rng.randint(2, 12), rng.randint(2, 20)
    return (
        f"Question: The {place} has {a} boxes with {b} {thing} each. How many {thing} are there in total?\n"
        f"Answer: {a} * {b} = {a * b}. There are {a * b} {thing} in the {place}."
    )


def _share(rng: random.Random) -> str:
    name, thing, friends, each = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 20)
    total = friends * each
    return (
        f"Question: {name} shares {total} {thing} equally among {friends} friends. How many does each friend get?\n"
        f"Answer: {total} / {friends} = {each}. Each friend gets {each} {thing}."
    )


def _two_steps(rng: random.Random) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 50)
    return (
        f"Question: {name} buys {a} packs of {b} {thing} and already has {c} {thing}. "
        f"How many {thing} does {name} have in total?\n"
        f"Answer: {a} * {b} = {a * b}. {a * b} + {c} = {a * b + c}. {name} has {a * b + c} {thing}."
    )


def _older(rng: random.Random) -> str:
    (first, second), a, b = rng.sample(NAMES, 2), rng.randint(5, 60), rng.randint(2, 30)
    return (
        f"Question: {first} is {a} years old. {second} is {b} years older than {first}. How old is {second}?\n"
        f"Answer: {a} + {b} = {a + b}. {second} is {a + b} years old."
    )


def _sum(rng: random.Random) -> str:
    a, b, c = rng.randint(1, 99), rng.randint(1, 99), rng.randint(1, 99)
    return f"Compute {a} + {b} + {c}.\n{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}\nResult: {a + b + c}"


def _product(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 99)
    return f"Compute {a} * {b} + {c}.\n{a} * {b} = {a * b}\n{a * b} + {c} = {a * b + c}\nResult: {a * b + c}"


def _unknown(rng: random.Random) -> str:
    a, x = rng.randint(1, 99), rng.randint(1, 99)
    return f"Solve x + {a} = {a + x}.\nx = {a + x} - {a}\nx = {x}\nCheck: {x} + {a} = {a + x}"


TEMPLATES: tuple[Callable[[random.Random], str], ...] = (
    _gain,
    _loss,
    _boxes,
    _share,
    _two_steps,
    _older,
    _sum,
    _product,
    _unknown,
)
