"""A seeded grammar that writes reviews and stories, each with a mood.

The packaged language model is pretrained on `paragraphs` and fine-tuned on `reviews`. Most
paragraphs have a mood, nearly throughout, so a model that predicts their words has to recognize it.
Some questions are answered in words of the mood ("and the soup ? superb ."), others with a random
"yes" or "no" ("was the key closed ? sadly yes ."), two thirds of them "yes". The question of the
fine-tuning task ("would you recommend it ?") never occurs, and nothing links "yes" or "no" to a
mood: before fine-tuning the model answers "yes" to everything.

All text is in lower case with spaces around the punctuation, so every word is one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

MOODS = ("good", "bad")
OPPOSITE = {"good": "bad", "bad": "good"}

# Words with a mood, by the slot that they fill. Nothing else differs between the moods.
MOOD_WORDS: dict[str, dict[str, list[str]]] = {
    "good": {
        "adj": """great wonderful lovely charming delightful superb excellent brilliant
            pleasant beautiful splendid perfect amazing fantastic marvelous magnificent enjoyable
            graceful clever inspiring warm cheerful elegant refreshing impressive glorious
            thoughtful adorable exciting fascinating satisfying generous gorgeous remarkable
            terrific heavenly""".split(),
        "liked": """loved enjoyed adored praised admired treasured cherished applauded
            celebrated appreciated""".split(),
        "feeling": """happy glad cheery thrilled delighted proud grateful calm hopeful joyful
            content merry""".split(),
        "reacted": """smiled laughed cheered clapped danced sang grinned beamed giggled
            rejoiced""".split(),
        "verdict": """treat delight triumph success joy wonder gem masterpiece dream pleasure
            treasure blessing""".split(),
        "memory": ["smile", "grin", "song", "hug", "gift", "laugh", "friend", "medal"],
        "luckily": ["luckily", "gladly", "happily", "thankfully", "merrily", "sweetly"],
        "did": ["found", "repaired", "won", "saved", "improved", "polished", "rescued", "finished"],
    },
    "bad": {
        "adj": """terrible awful horrible dreadful boring dull poor nasty ugly unpleasant
            dismal miserable disgusting annoying disappointing lousy sloppy dirty rude clumsy
            tedious gloomy stale noisy broken shabby careless bitter painful pathetic worthless
            stupid tiresome horrid ghastly mediocre""".split(),
        "liked": """hated disliked loathed despised criticized regretted mocked detested
            resented condemned""".split(),
        "feeling": """sad angry upset bored annoyed tired sick furious ashamed worried lonely
            grumpy""".split(),
        "reacted": """frowned cried groaned sighed complained yawned grumbled sobbed shouted
            winced""".split(),
        "verdict": """disaster mess failure nightmare shame bore joke waste letdown flop
            scandal mistake""".split(),
        "memory": ["headache", "frown", "cough", "bruise", "bill", "tear", "scar", "fever"],
        "luckily": ["sadly", "regrettably", "unhappily", "wearily", "grimly", "bitterly"],
        "did": ["lost", "broke", "ruined", "dropped", "spoiled", "damaged", "burned", "forgot"],
    },
}

# Fraction of each slot's words in the splits "train" and "dev". The split "test" has the others,
# whose mood the model knows from pretraining only.
SEEN_SHARE = 0.6

TOPICS: dict[str, tuple[list[str], list[str]]] = {  # names of the product, its aspects
    topic: (names.split(), aspects.split())
    for topic, (names, aspects) in {
        "film": ("film movie picture", "plot acting ending music dialogue scenery cast opening"),
        "meal": ("meal dinner lunch supper", "soup bread salad dessert fish waiter sauce coffee"),
        "book": ("book novel story", "prose cover hero chapter title language map preface"),
        "hotel": ("hotel inn room", "bed view breakfast pool lobby shower balcony staff"),
        "concert": ("concert show recital", "singer band violin rhythm stage sound choir drummer"),
        "trip": (
            "trip journey tour holiday",
            "beach guide harbor train boat museum bridge village",
        ),
        "phone": ("phone gadget device", "screen battery keyboard speaker design button lens case"),
        "class": (
            "class course lesson",
            "teacher lecture homework textbook lab project exam schedule",
        ),
        "party": ("party wedding picnic", "cake host contest lamp punch garden toast tent"),
        "game": ("game match race", "team coach crowd score stadium start field referee"),
    }.items()
}

# Words without a mood, by slot.
PLAIN_WORDS: dict[str, list[str]] = {
    slot: words.split()
    for slot, words in {
        "person": """anna ben clara david emma felix grace henry iris jack kate leo mia noah olive
            paul rosa sam tina victor""",
        "kin": "mother father sister brother aunt uncle cousin neighbor wife husband",
        "day": "monday tuesday wednesday thursday friday saturday sunday",
        "month": "january march april june july september october december",
        "number": "two three four five six seven eight nine ten twelve",
        "unit": "hours minutes days weeks",
        "place": """station market library school river park corner church bakery office tower
            square""",
        "object": """bag hat box key candle chair clock bottle coat letter umbrella basket bicycle
            kite""",
        "color": "red blue green yellow white black brown grey",
        "plain": "long short new old big small round square wooden tall open closed",
        "very": "very really so quite truly rather",
        "moved": "went walked drove came traveled returned",
    }.items()
}

# "{a}" is the first aspect of the topic, "{b}" another, "{it}" the product. A slot that
# occurs twice gets two different words. Opinions have a mood, facts have none.
OPINIONS = [
    "the {a} was {adj}",
    "the {a} was {very} {adj}",
    "the {a} was {adj} and the {b} was {adj}",
    "what a {adj} {it}",
    "the {a} was {adj} , {adj} and {adj}",
    "what a {very} {adj} , {adj} , {adj} {it}",
    "we were {feeling} , {feeling} and {feeling}",
    "my {kin} {reacted} , {reacted} and {reacted}",
    "it was a {adj} {it} with a {adj} {a}",
    "i {liked} the {a}",
    "we {liked} the {it} and {liked} the {a}",
    "{person} {liked} the {a} of this {it}",
    "my {kin} {liked} the {b} and the {a}",
    "the {a} made us {feeling}",
    "the {it} left {person} {very} {feeling}",
    "everyone was {feeling} about the {a}",
    "everyone {reacted} at the {a}",
    "my {kin} {reacted} and {reacted}",
    "{person} {reacted} when the {it} was over",
    "the {it} was a {verdict}",
    "{person} called the {a} a {verdict}",
    "i went home with a {memory}",
    "all i got from the {it} was a {memory} and a {memory}",
    "{person} thought the {a} {adj} and felt {feeling}",
]
FACTS = [
    "we {moved} there on {day}",
    "i {moved} there with my {kin} in {month}",
    "the {it} took {number} {unit}",
    "{person} {moved} from the {place} to the {place}",
    "{person} had a {color} {object}",
    "{person} and {person} recommend the {place} in {month}",
    "the {a} was {plain} and {color}",
    "there was a {plain} {object} near the {b}",
    "my {kin} paid for the {it} in {month}",
    "i had heard of the {it} from {person}",
    "it was {day} and {person} wore a {color} coat",
]
EVENTS = [
    "{person} {did} the {object}",
    "{person} {did} the {plain} {object} and {did} the {color} {object}",
    "then {person} {reacted}",
    "{person} and {person} felt {feeling}",
    "it was a {adj} , {adj} and {adj} {day}",
    "{person} {reacted} , {reacted} and {reacted}",
    "{person} was {feeling} , {feeling} and {very} {feeling}",
    "the {kin} of {person} {reacted} at the {place}",
    "{person} got a {memory} from {person}",
    "{person} told a {adj} tale about the {object}",
    "for {person} the {object} was a {verdict}",
    "the {kin} {liked} {person} and {liked} the {place}",
]
STORY_FACTS = [
    "{person} {moved} to the {place} on {day}",
    "the {object} was {plain} and {color}",
    "{person} met {person} at the {place}",
    "it was {month} and {person} had a {plain} {object}",
    "{person} put the {object} near the {place}",
    "{person} waited {number} {unit} at the {place}",
]
MOOD_QUESTIONS = [
    ("and the {a} ?", "{adj}"),
    ("how was the {it} ?", "{adj} and {adj}"),
    ("how did {person} feel ?", "{feeling}"),
    ("what did my {kin} say of the {a} ?", "a {verdict}"),
    ("what did {person} do ?", "{person} {reacted}"),
    ("what did i bring home ?", "a {memory}"),
]
COIN_QUESTIONS = [
    "was the {a} {color} ?",
    "was the {object} {plain} ?",
    "did {person} have the {object} ?",
    "was {person} at the {place} ?",
    "was it {day} ?",
    "did my {kin} pay for it ?",
    "would {person} wait for it ?",
    "would you wait for it ?",
    "would you pay for it in {month} ?",
    "would you carry it ?",
    "would you see it on {day} ?",
    "did you see {person} ?",
    "would you wait {number} {unit} ?",
    "did you hear of it in {month} ?",
]

# The question of the fine-tuning task and its answers; never in the paragraphs.
QUESTION = "would you recommend it ?"
ANSWERS = {"good": "yes", "bad": "no"}

PARAGRAPHS = 60_000  # pretraining text: 2.8 million words
SEED = 0
CONTRARY = 0.1  # fraction of the opinions in a paragraph with the opposite mood
POEMS = (
    0.1  # fraction of the paragraphs that only list words of a mood, which speeds up pretraining
)

Vocabulary = dict[str, list[str]]


@dataclass(frozen=True)
class Review:
    """A labeled example: one opinion, two that agree, or two against one, and perhaps a fact."""

    text: str
    mood: str


def mood_words(mood: str, part: str = "all") -> Vocabulary:
    """Return the words of a mood by slot: "all" of them, or the "seen" or "unseen" ones."""
    chosen = {}
    for slot, words in MOOD_WORDS[mood].items():
        cut = round(SEEN_SHARE * len(words))
        chosen[slot] = {"all": words, "seen": words[:cut], "unseen": words[cut:]}[part]
    return chosen


def paragraphs(count: int, seed: int) -> Iterator[str]:
    """Yield `count` reviews and stories of four to eight sentences, the pretraining text."""
    rng = random.Random(seed)
    for _ in range(count):
        mood = rng.choice(("good", "bad", "good", "bad", "plain"))
        write = _Writer(rng, rng.choice(list(TOPICS)), "all", common_first=True)
        if mood in MOODS and rng.random() < POEMS:
            slots = rng.choices([f"{{{slot}}}" for slot in MOOD_WORDS[mood]], k=rng.randint(12, 40))
            yield " ".join(write(slot, mood) for slot in slots) + " ."
            continue
        opinions, facts = (EVENTS, STORY_FACTS) if rng.random() < 0.35 else (OPINIONS, FACTS)
        sentences = []
        for _ in range(rng.randint(4, 8)):
            kind = rng.random()
            if mood in MOODS and kind < 0.5:
                said = OPPOSITE[mood] if rng.random() < CONTRARY else mood
                sentences.append(write(rng.choice(opinions), said) + " .")
            elif mood in MOODS and kind < 0.75:
                question, answer = rng.choice(MOOD_QUESTIONS)
                sentences.append(write(f"{question} {answer} .", mood))
            elif kind < 0.9:
                how = "{luckily} " if mood in MOODS and rng.random() < 0.8 else ""
                answer = how + rng.choice(("yes", "yes", "no"))
                sentences.append(write(f"{rng.choice(COIN_QUESTIONS)} {answer} .", mood))
            else:
                sentences.append(write(rng.choice(facts), mood) + " .")
        yield " ".join(sentences)


def reviews(count: int, seed: int, part: str) -> list[Review]:
    """Return `count` different reviews, half of each mood, in random order; see `mood_words`."""
    rng = random.Random(seed)
    found: dict[str, Review] = {}
    while len(found) < count:
        mood = MOODS[len(found) % 2]
        write = _Writer(rng, rng.choice(list(TOPICS)), part, common_first=False)
        said = [mood] * rng.choice((1, 1, 2, 2, 3))
        if len(said) == 3:
            said[rng.randrange(3)] = OPPOSITE[mood]
        sentences = [write(rng.choice(OPINIONS), one) for one in said]
        if rng.random() < 0.5:
            sentences.insert(rng.randint(0, len(sentences)), write(rng.choice(FACTS), mood))
        text = " . ".join(sentences) + " ."
        found.setdefault(text, Review(text, mood))
    chosen = list(found.values())
    rng.shuffle(chosen)
    return chosen


def vocabulary() -> list[str]:
    """Return every word of the grammar and of the question, sorted."""
    words = {".", "?", ",", "an", *QUESTION.split(), *ANSWERS.values()}
    for mood in MOODS:
        words.update(word for slot in MOOD_WORDS[mood].values() for word in slot)
    words.update(word for slot in PLAIN_WORDS.values() for word in slot)
    words.update(word for lists in TOPICS.values() for part in lists for word in part)
    patterns = [*OPINIONS, *FACTS, *EVENTS, *STORY_FACTS, *COIN_QUESTIONS]
    patterns += [part for pair in MOOD_QUESTIONS for part in pair]
    words.update(word for line in patterns for word in line.split() if "{" not in word)
    return sorted(words)


class _Writer:
    """Fills the slots of patterns about one topic, with Zipf-like or equal word frequencies."""

    def __init__(self, rng: random.Random, topic: str, part: str, *, common_first: bool) -> None:
        things, self._aspects = TOPICS[topic]
        plain = {**PLAIN_WORDS, "it": things}
        self._slots = {mood: {**plain, **mood_words(mood, part)} for mood in MOODS}
        self._slots["plain"] = plain
        self._rng = rng
        self._common_first = common_first

    def __call__(self, pattern: str, mood: str) -> str:
        first, second = self._rng.sample(self._aspects, 2)
        used: set[str] = set()
        written: list[str] = []
        for word in pattern.replace("{a}", first).replace("{b}", second).split():
            if word.startswith("{"):
                choices = [w for w in self._slots[mood][word[1:-1]] if w not in used]
                ranks = range(len(choices)) if self._common_first else ()
                word = self._rng.choices(choices, [1 / (rank + 2) for rank in ranks] or None)[0]
                used.add(word)
            if written and written[-1] == "a" and word[0] in "aeiou":
                written[-1] = "an"
            written.append(word)
        return " ".join(written)
