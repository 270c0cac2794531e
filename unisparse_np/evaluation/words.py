"""Words that examples are made of, and sentences put together from them: the same on every machine."""

from __future__ import annotations

import re
from random import Random


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words("""
amber ancient angry bitter bold brave brief bright brisk broad calm careful cheap clean clever cloudy cold cool crimson
crooked curious dark deep dense distant dry dusty eager early empty faint fair famous fierce firm flat fond formal frail
fresh gentle giant golden grand gray green happy harsh hasty heavy hidden hollow huge humble icy idle jolly keen kind large
late lazy light little lively lonely long loose loud loyal lucky merry mild modern modest narrow neat noble odd old open
orange outer pale patient plain polite proud purple quick quiet rapid rare ripe rough round rural rusty salty sharp short shy
silent silver simple
""")
NOUNS = _words("""
acorn anchor apple arch arrow badge bakery balloon banner barn barrel basket beach beacon beetle bell bench bicycle blanket
boat bottle bowl branch bread brick bridge brush bucket butter button cabin cactus camera candle canoe canvas carpet castle
cave cellar chain chalk cheese cherry chimney circle cliff clock cloud coach coat coin compass corner cottage cradle crane
crown cup curtain dagger deer desert diamond door dragon drum eagle engine envelope falcon feather fence ferry field flag
flask flute forest fountain fox garden gate glove goose guitar hammer harbor harp hill honey horse island jacket jar jewel
kettle key kite ladder lake lamp lantern leaf lemon letter lion magnet map marble market meadow mirror moon mountain mug
needle nest oak ocean onion orchard owl paddle palace parrot path peach pearl pencil piano pillow planet plum pond puzzle
quilt raft ribbon river road rocket roof rope rose saddle sail salmon scarf school shadow shell ship shoe shovel spoon stable
star statue stone storm stove street sword table tent thread throne ticket tower train tunnel turtle umbrella valley vase
violin wagon wall whale wheel window
""")
VERBS = _words("""
admired borrowed bought brought built buried carried chased cleaned collected copied counted covered crossed dragged dropped
examined filled followed forgot found gathered guarded ignored inspected joined kept lifted lost mended missed moved noticed
opened packed painted passed placed polished praised pulled pushed raised repaired rescued shared sketched sold stole studied
""")
FIRST_NAMES = _words("""
Adam Alice Amanda Andrew Anna Arthur Barbara Brian Carla Charles Clara Daniel Diana Edward Elena Emily Eric Felix Fiona
George Grace Hannah Harold Helen Henry Irene Isabel Jacob James Jane Julia Karen Kevin Laura Leo Linda Louis Lucy Marcus
Maria Martin Michael Mona Nancy Nathan Nina Oliver Oscar Patrick Paul Peter Philip Rachel Rebecca Robert Rosa Ruth Samuel
Sarah Simon
""")
LAST_NAMES = _words("""
Abbott Archer Baldwin Barker Bishop Brooks Butler Carver Chandler Clayton Cooper Dalton Draper Ellis Farrow Fisher Fletcher
Forrest Foster Fuller Gardner Glover Goodwin Graves Hale Harper Hobbs Holt Hunter Keller Kirby Lambert Langley Lowell Marsh
Mercer Miller Nolan Norris Osborn Palmer Parker Porter Potter Quinn Ramsey Reeves Rowland Sawyer Shepherd Skinner Slater
Spencer Stanton Sutton Taylor Thatcher Turner Tyler Underwood Vaughn Wagner Walker Ward Weaver Webster Whitaker Wilder Yates
""")
PLACES = _words("""
Athens Bergen Berlin Boston Bristol Brussels Cairo Calgary Chicago Cologne Delhi Denver Dublin Florence Geneva Glasgow
Hamburg Havana Helsinki Houston Istanbul Jakarta Kyoto Lagos Leeds Lima Lisbon London Lyon Madrid Manila Miami Milan Montreal
Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Oxford Paris Perth Porto Prague Quito Riga Rome Seattle Seoul Seville
Sydney
""")
JOBS = _words("""
architect baker barber butcher carpenter chemist clerk cook dentist designer editor electrician engineer farmer florist
geologist historian inventor journalist judge lawyer librarian mason mechanic merchant miner musician nurse painter
pharmacist photographer physicist plumber poet porter printer professor sailor sculptor surgeon tailor teacher translator
weaver
""")

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PROSE = (
    "The {a} {n} stood near the {m} for {c} years.",
    "{f} {v} a {a} {n} in {p} and told nobody.",
    "In {p} the {j} {v} the {a} {n} before the {m} was ready.",
    "{f} and {g} {v} the {n} behind the {a} {m}.",
    "The {j} from {p} {v} the {n}, and then the {m} was {a}.",
    "When the {n} was {a}, {f} {v} the {m} of the {j}.",
    "Nobody in {p} {v} the {a} {n} that the {j} had left beside the {m}.",
    "It was a {a} day, so the {j} {v} the {n} and went home to {p}.",
    "{f} said that the {n} under the {m} was {a}.",
    "Every {a} {n} in {p} has a {m} that somebody {v}.",
    "The {j} {v} the {n}, but {f} wanted the {a} {m} more.",
    "For {c} days there was a {a} {n} on the road to {p}.",
)


def prose_sentences(random: Random, count: int) -> list[str]:
    """`count` sentences of made-up narrative."""
    return [
        with_articles(
            random.choice(_PROSE).format(
                a=random.choice(ADJECTIVES),
                n=random.choice(NOUNS),
                m=random.choice(NOUNS),
                v=random.choice(VERBS),
                f=random.choice(FIRST_NAMES),
                g=random.choice(FIRST_NAMES),
                p=random.choice(PLACES),
                j=random.choice(JOBS),
                c=random.randrange(2, 100),
            )
        )
        for _ in range(count)
    ]


def with_articles(sentence: str) -> str:
    """`a` becomes `an` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)


def noun_phrases(random: Random, count: int) -> list[str]:
    """`count` different phrases such as `amber-kettle`."""
    numbers = random.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in numbers]


def single_words(random: Random, count: int) -> list[str]:
    """`count` different words in random order; beyond the words listed here, compounds such as `amberkettle`.

    From generators in the same state, a longer list begins like a shorter one.
    """
    words = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    random.shuffle(words)
    if count > len(words):
        compounds = [adjective + noun for adjective in ADJECTIVES for noun in NOUNS]
        random.shuffle(compounds)
        words += compounds
    return words[:count]


def person_names(random: Random, count: int) -> list[str]:
    """`count` different names such as `Alice Archer`; beyond the pairs that exist, with an initial in between."""
    pairs = len(FIRST_NAMES) * len(LAST_NAMES)
    numbers = random.sample(range(pairs * 26 if count > pairs else pairs), count)
    names = []
    for number in numbers:
        initial, pair = divmod(number, pairs)
        middle = f" {chr(ord('A') + initial)}." if count > pairs else ""
        names.append(f"{FIRST_NAMES[pair // len(LAST_NAMES)]}{middle} {LAST_NAMES[pair % len(LAST_NAMES)]}")
    return names


def uuid(random: Random) -> str:
    """Thirty-two hexadecimal digits in the groups of a UUID."""
    digits = f"{random.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def numbers(random: Random, digits: int, count: int) -> list[str]:
    """`count` different numbers of so many digits."""
    low = 10 ** (digits - 1)
    return [str(low + n) for n in random.sample(range(9 * low), count)]
