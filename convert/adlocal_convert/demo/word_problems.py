"""Worked arithmetic word problems, written for this project: the traces and the prompts of `adlocal demo`.

A scenario is a small function. It draws its numbers, works the problem out, and returns the question (in one
of two phrasings), the steps of the solution and the answer. Numbers are drawn so that divisions are exact and
every quantity is at least two: plurals are then always right.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Worked(NamedTuple):
    """A problem with its solution; each step is one sentence with its arithmetic written out."""

    question: str
    steps: list[str]
    answer: int

    @property
    def solution(self) -> str:
        """The steps, a line each, then "#### " and the answer."""
        return "\n".join([*self.steps, f"#### {self.answer}"])


class Person(NamedTuple):
    """A name with its pronoun, inside a sentence and at the start of one."""

    name: str
    he: str
    He: str


WOMEN = ("Amara", "Beatriz", "Dana", "Ewa", "Farida", "Ingrid", "Leila", "Mei", "Priya", "Rosa", "Yuki")
MEN = ("Anton", "Bao", "Callum", "Emeka", "Goran", "Hassan", "Jonas", "Mateo", "Nikhil", "Oskar", "Tomas")
PEOPLE = [Person(name, "she", "She") for name in WOMEN] + [Person(name, "he", "He") for name in MEN]

GOALS = ("bicycle", "telescope", "guitar", "tent", "camera", "keyboard", "kayak")
JOBS = ("walking dogs", "mowing lawns", "washing cars", "babysitting", "delivering newspapers")
FRUIT = ("apples", "pears", "plums", "peaches", "apricots", "oranges")
MATERIALS = (("ribbon", "centimeters"), ("wire", "centimeters"), ("string", "inches"), ("cloth", "inches"))
PASTIMES = ("practicing the violin", "learning Spanish", "drawing", "jogging", "reading", "juggling")
VEHICLES = (("train", 120), ("bus", 80), ("ferry", 40), ("truck", 85), ("sailing boat", 30))  # top speed
ITEMS = ("stickers", "marbles", "stamps", "shells", "postcards", "badges")
MULTIPLES = ((2, "twice"), (3, "three times"), (4, "four times"), (5, "five times"))
PLACES = ("vegetable garden", "paddock", "playground", "chicken run", "meadow")
GOODS = (("notebooks", "pens"), ("mugs", "bowls"), ("rose bushes", "bags of soil"), ("T-shirts", "caps"))


def savings(rng: Random) -> Worked:
    """What is missing, divided by what comes in each week."""
    who, goal, job = rng.choice(PEOPLE), rng.choice(GOALS), rng.choice(JOBS)
    saved, rate = rng.randrange(20, 95, 5), rng.randrange(6, 15)
    hours, weeks = rng.randrange(2, 7), rng.randrange(3, 13)
    weekly = rate * hours
    missing = weekly * weeks
    price = saved + missing
    questions = (
        f"{who.name} wants to buy a {goal} that costs ${price}. {who.He} has already saved ${saved}, and "
        f"{who.he} earns ${rate} an hour {job} for {hours} hours every week. How many weeks must {who.he} "
        f"work to afford the {goal}?",
        f"A {goal} costs ${price}, and {who.name} has ${saved} so far. Every week {who.he} spends {hours} "
        f"hours {job} and is paid ${rate} an hour. If {who.he} saves all of it, after how many weeks can "
        f"{who.he} buy the {goal}?",
    )
    steps = [
        f"Each week {who.name} earns {rate} * {hours} = {weekly} dollars.",
        f"{who.He} still needs {price} - {saved} = {missing} dollars for the {goal}.",
        f"At {weekly} dollars a week, that takes {missing} / {weekly} = {weeks} weeks.",
    ]
    return Worked(rng.choice(questions), steps, weeks)


def orchard(rng: Random) -> Worked:
    """Crates of fruit, the bruised set aside, the rest shared out among bags."""
    who, fruit = rng.choice(PEOPLE), rng.choice(FRUIT)
    crates, each, size = rng.randrange(4, 13), rng.randrange(30, 61), rng.choice((6, 8, 10, 12))
    picked = crates * each
    bruised = picked % size + size  # so that the rest fills whole bags
    sound = picked - bruised
    bags = sound // size
    questions = (
        f"{who.name} picks {crates} crates of {fruit}, with {each} {fruit} in each crate. Of these, "
        f"{bruised} {fruit} are bruised and are kept for juice. {who.He} packs the rest into bags of {size}. "
        f"How many bags does {who.he} fill?",
        f"At the market, {who.name} unpacks {crates} crates that hold {each} {fruit} each. {who.He} sets "
        f"aside {bruised} bruised {fruit} and sorts the others into bags of {size}. How many bags of {fruit} "
        f"can {who.he} sell?",
    )
    steps = [
        f"The crates hold {crates} * {each} = {picked} {fruit} in all.",
        f"Without the bruised ones, {picked} - {bruised} = {sound} {fruit} are left.",
        f"With {size} {fruit} in a bag, {who.name} fills {sound} / {size} = {bags} bags.",
    ]
    return Worked(rng.choice(questions), steps, bags)


def cutting(rng: Random) -> Worked:
    """A length, less the pieces cut off it, in equal parts."""
    who, (material, unit) = rng.choice(PEOPLE), rng.choice(MATERIALS)
    pieces, piece = rng.randrange(3, 10), rng.randrange(12, 41)
    parts, part = rng.randrange(4, 13), rng.randrange(8, 31)
    used, rest = pieces * piece, parts * part
    total = used + rest
    questions = (
        f"A roll of {material} is {total} {unit} long. {who.name} cuts off {pieces} pieces of {piece} {unit} "
        f"each and divides what remains into {parts} equal parts. How many {unit} long is each part?",
        f"{who.name} has {total} {unit} of {material}. First {who.he} uses {pieces} pieces of {piece} {unit} "
        f"each, and then {who.he} cuts the rest into {parts} equal parts. How long, in {unit}, is each of "
        f"these parts?",
    )
    steps = [
        f"The first {pieces} pieces take {pieces} * {piece} = {used} {unit} of {material}.",
        f"That leaves {total} - {used} = {rest} {unit}.",
        f"Each of the {parts} equal parts is {rest} / {parts} = {part} {unit} long.",
    ]
    return Worked(rng.choice(questions), steps, part)


def practice(rng: Random) -> Worked:
    """Minutes on five weekdays and two weekend days, over some weeks."""
    who, pastime = rng.choice(PEOPLE), rng.choice(PASTIMES)
    weekday, weekend, weeks = rng.randrange(15, 50, 5), rng.randrange(30, 95, 5), rng.randrange(2, 7)
    weekdays, weekends = 5 * weekday, 2 * weekend
    weekly = weekdays + weekends
    total = weeks * weekly
    questions = (
        f"{who.name} spends {weekday} minutes {pastime} on each of the five weekdays, and {weekend} minutes "
        f"on Saturday and again on Sunday. How many minutes does {who.he} spend {pastime} in {weeks} weeks?",
        f"From Monday to Friday, {who.name} spends {weekday} minutes a day {pastime}. On Saturdays and "
        f"Sundays {who.he} spends {weekend} minutes a day on it. How many minutes is that in {weeks} weeks?",
    )
    steps = [
        f"The weekdays make 5 * {weekday} = {weekdays} minutes.",
        f"The weekend makes 2 * {weekend} = {weekends} minutes.",
        f"In one week {who.name} spends {weekdays} + {weekends} = {weekly} minutes {pastime}.",
        f"In {weeks} weeks that is {weeks} * {weekly} = {total} minutes.",
    ]
    return Worked(rng.choice(questions), steps, total)


def journey(rng: Random) -> Worked:
    """Two stretches at two speeds, taken from the whole way."""
    vehicle, top = rng.choice(VEHICLES)
    early, late, fast = rng.randrange(2, 8), rng.randrange(2, 6), top - rng.randrange(12)
    slow = fast - rng.randrange(3, 12)
    first, second = fast * early, slow * late
    covered, left = first + second, rng.randrange(15, 120)
    total = covered + left
    questions = (
        f"A {vehicle} sets out on a trip of {total} kilometers. It travels at {fast} kilometers an hour for "
        f"{early} hours, then slows to {slow} kilometers an hour for {late} hours. How many kilometers are "
        f"left?",
        f"The route of a {vehicle} is {total} kilometers long. After {early} hours at {fast} kilometers an "
        f"hour, bad weather slows it to {slow} kilometers an hour for the next {late} hours. How far, in "
        f"kilometers, is it then from the end of the route?",
    )
    steps = [
        f"In the first {early} hours the {vehicle} travels {early} * {fast} = {first} kilometers.",
        f"In the next {late} hours it travels {late} * {slow} = {second} kilometers.",
        f"So far that is {first} + {second} = {covered} kilometers.",
        f"The {vehicle} still has {total} - {covered} = {left} kilometers to go.",
    ]
    return Worked(rng.choice(questions), steps, left)


def collections(rng: Random) -> Worked:
    """Three collections, each told by the one before, and their sum."""
    names = [*WOMEN, *MEN]
    ann, bob, cid = (names.pop(rng.randrange(len(names))) for _ in range(3))
    items, (multiple, often) = rng.choice(ITEMS), rng.choice(MULTIPLES)
    anns, fewer = rng.randrange(12, 40), rng.randrange(3, 12)
    bobs = multiple * anns
    cids = bobs - fewer
    total = anns + bobs + cids
    questions = (
        f"{ann} has {anns} {items}. {bob} has {often} as many {items} as {ann}, and {cid} has {fewer} fewer "
        f"than {bob}. How many {items} do the three friends have altogether?",
        f"{ann}, {bob} and {cid} collect {items}. {cid} has {fewer} fewer than {bob}, who has {often} as "
        f"many as {ann}. If {ann} has {anns} {items}, how many are there in the three collections together?",
    )
    steps = [
        f"{bob} has {multiple} * {anns} = {bobs} {items}.",
        f"{cid} has {fewer} fewer, which is {bobs} - {fewer} = {cids} {items}.",
        f"Together the three have {anns} + {bobs} + {cids} = {total} {items}.",
    ]
    return Worked(rng.choice(questions), steps, total)


def fence(rng: Random) -> Worked:
    """The perimeter of a rectangle, less a gap, at a price a meter."""
    who, place = rng.choice(PEOPLE), rng.choice(PLACES)
    width, gate, price = rng.randrange(8, 25), rng.randrange(2, 5), rng.randrange(5, 19)
    length = width + rng.randrange(3, 20)
    half, around = length + width, 2 * (length + width)
    fenced = around - gate
    cost = fenced * price
    questions = (
        f"{who.name} builds a fence around a rectangular {place} that is {length} meters long and {width} "
        f"meters wide, leaving a gap of {gate} meters for the gate. If the fence costs ${price} a meter, how "
        f"many dollars does {who.he} pay for it?",
        f"A rectangular {place} measures {length} meters by {width} meters. {who.name} fences it on all "
        f"sides except for an opening {gate} meters wide. At ${price} a meter, what does the fence cost, in "
        f"dollars?",
    )
    steps = [
        f"One long side and one short side make {length} + {width} = {half} meters.",
        f"All the way around it is 2 * {half} = {around} meters.",
        f"Without the opening, {around} - {gate} = {fenced} meters of fence are needed.",
        f"The fence costs {fenced} * {price} = {cost} dollars.",
    ]
    return Worked(rng.choice(questions), steps, cost)


def shopping(rng: Random) -> Worked:
    """What is left in the purse after buying two kinds of things."""
    who, (these, those) = rng.choice(PEOPLE), rng.choice(GOODS)
    first, second = rng.randrange(2, 9), rng.randrange(2, 9)
    price, other, left = rng.randrange(5, 16), rng.randrange(2, 9), rng.randrange(2, 40)
    cost, more = first * price, second * other
    purse = cost + more + left
    questions = (
        f"{who.name} goes shopping with ${purse}. {who.He} buys {first} {these} for ${price} each and "
        f"{second} {those} for ${other} each. How many dollars does {who.he} have left?",
        f"At one shop, {these} cost ${price} each and {those} cost ${other} each. {who.name} has ${purse} "
        f"and buys {first} {these} and {second} {those}. How much money, in dollars, is left over?",
    )
    steps = [
        f"The {these} cost {first} * {price} = {cost} dollars.",
        f"The {those} cost {second} * {other} = {more} dollars.",
        f"After paying for both, {who.name} has {purse} - {cost} - {more} = {left} dollars left.",
    ]
    return Worked(rng.choice(questions), steps, left)


Scenario = Callable[[Random], Worked]
SCENARIOS: tuple[Scenario, ...] = (savings, orchard, cutting, practice, journey, collections, fence, shopping)
MAX_PROBLEMS = 10_000  # each scenario can make many times its share, so few questions are drawn twice


def word_problems(n: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`n` distinct problems as {"prompt": question, "completion": worked solution}; scenarios take turns.

    The last line of a solution is "#### " and the answer, an integer. A seed gives the same sequence on any
    Python, and a larger `n` only extends it: cut traces and prompts from one call and they share no question.
    Raises ValueError unless 1 <= n <= MAX_PROBLEMS.
    """
    if not 1 <= n <= MAX_PROBLEMS:
        raise ValueError(f"n is {n}: ask for 1 to {MAX_PROBLEMS} word problems")
    rng = Random(seed)
    solutions: dict[str, str] = {}  # by question: one drawn twice counts once, and its scenario goes again
    while len(solutions) < n:
        worked = SCENARIOS[len(solutions) % len(SCENARIOS)](rng)
        solutions[worked.question] = worked.solution
    return [{"prompt": question, "completion": solution} for question, solution in solutions.items()]
