"""Requests that a picture answers, and requests about the same things that words answer; made by templates from pairs.

Words alone must not give the decision away: both sides name the same things and speak of pictures and of drawing, and both come
with a picture in the question too. The test split's templates are never trained on, nor are its captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from fmray.config.data import EmojiSource
from fmray.config.dialogues import RequestSource
from fmray.data.dialogues import ListedDialogues
from fmray.data.dialogues_pairs import PairPictures, captioned
from fmray.data.reviews import folded, load_reviews, text_hash
from fmray.data.sources import Split
from fmray.errors import DataError
from fmray.types import Dialogue, Turn

PICTURE, AGAIN, LOOK = "picture", "again", "look"
"""Kinds of requests: a picture of something named, another of a picture shown, what a picture shows; then those of words."""
WORD_KINDS = ("name", "letter", "several", "translation")

TEMPLATES: dict[str, dict[Split, tuple[str, ...]]] = {
    PICTURE: {
        "train": (
            *("draw {}", "draw me {}", "sketch {} for me", "please paint {}", "let me see {}"),
            *("show me a picture of {}", "I would like to see {}", "can you make an image of {}?"),
            *("a picture of {}, please", "I need an illustration of {}", "what does {} look like? show me"),
            *("write nothing, only draw {}", "do not say what {} is called, show it"),
        ),
        "test": (
            *("could you show me {}?", "please draw a picture of {}", "I want an image of {}"),
            *("create a picture that shows {}", "do not write about {}, paint it"),
        ),
    },
    AGAIN: {
        "train": (
            *("draw this again", "show me another picture of this", "paint the same thing"),
            *("can you make an image like this one?", "do not name it, draw it"),
            *(
                "make a second picture of it",
                "sketch this for me, a bit different",
                "one more like that, please",
            ),
            *("I need a new image of this thing", "show this to me in a new style", "repeat it as a drawing"),
            *("do not tell me its name, let me look at it again", "could I have a variant of the picture?"),
        ),
        "test": ("please draw the same once more", "I want to see another one of these"),
    },
    LOOK: {
        "train": (
            *("what is this?", "what does the picture show?", "name this, do not draw it"),
            *("can you tell me what this image is?", "I would like to know what is drawn here"),
            *("no drawing, only its name", "what would you call this?", "give it a name, sketch nothing"),
            *("which thing is in the picture?", "without a new picture: what is that?", "put it into words"),
            *("do not show me another one, name it", "please write down what the image shows"),
            # seeing is not always asking to be shown
            *("what can be seen here?", "can you see what this is?", "tell me about the picture"),
        ),
        "test": ("tell me what you see", "do not paint anything, say what this is"),
    },
    "name": {
        "train": (
            *("do not draw {}, only say its name", "no picture please: write the words {}"),
            *("what would you write under a picture of {}?", "type the name of {}, do not show it"),
        ),
        "test": ("do not show me {}, just write its name", "give me the title of a drawing of {}, no image"),
    },
    "letter": {
        "train": (
            *("which letter does {} begin with?", "what is the first letter of {}?"),
            *("in a picture book of letters, which one shows {}?", "before you draw {}: its first letter?"),
        ),
        "test": ("tell me the letter that {} starts with", "which letter is a picture of {} filed under?"),
    },
    "several": {
        "train": (
            *("is the name {} made of several words?", "does {} have more than one word?"),
            *(
                "would a picture of {} need several words as its title?",
                "can you see more than one word in {}?",
            ),
        ),
        "test": ("is {} more than a single word?", "if you drew {}, would its name take several words?"),
    },
    "translation": {
        "train": (
            *("what is the [] name of {}?", "translate {} into []", "say {} in []"),
            *("what do you call a picture of {} in []?", "do not draw {}, write it in []"),
        ),
        "test": ("how do you say {} in []?", "I would like to see {} written in []"),
    },
}
"""Kind of request → split → templates; {} is the thing, [] a language."""

LANGUAGES = {
    **{"ko": "Korean", "ja": "Japanese", "zh": "Chinese", "de": "German", "fr": "French"},
    **{"es": "Spanish", "it": "Italian", "pt": "Portuguese"},
}
WORDS_PER_TELLING = 3
"""Of so many noun phrases without a picture one is asked about in words too."""

_NOUN_PHRASE = re.compile(
    r"\b(?:an?|the|his|her|their) ((?:[a-z]{3,} )?[a-z]{3,})(?=[.,;:!?)]| (?:of|in|on|with|and|who|that|is|was|to|at|by|from)\b)"
)
"""What stands between an article and what follows a noun: mostly nouns, or an adjective and a noun."""


def open_requests(config: RequestSource, split: Split) -> ListedDialogues:
    """Requests of a split, in the order of its pictures, noun phrases without one last; called by the sample and the kind.

    A training picture brings for each caption a request for it and one that words answer, and two that show it; a test picture
    has these for its first caption. Raises DataError, AssetError.
    """
    source, rows = captioned(config.pairs, split)
    held_out = held_out_captions(config) if split == "train" else frozenset()
    translations = _translations(config, split)
    dialogues: list[Dialogue] = []
    for index, (sample, captions) in enumerate(rows):
        kept = [caption for caption in captions if folded(caption) not in held_out]
        key = f"{split}/{index}"
        for place, caption in enumerate(kept if split == "train" else kept[:1]):
            name = f"{sample}#{place}" if split == "train" else sample
            dialogues.append(_wanted(name, caption, split, key))
            # a translation is that of the first caption, the sample's own name
            known = translations[index] if place == 0 and caption == captions[0] else {}
            dialogues.append(_told(name, caption, split, known))
        if kept:
            dialogues += _shown(sample, kept[0], split, key)
    if split == "train" and config.words:
        known_words = held_out | {folded(caption) for _, captions in rows for caption in captions}
        dialogues += _without_pictures(noun_phrases(config.words, known_words))
    if not dialogues:
        cure = "take a split by what is shown: the test split's captions are never asked for in training"
        raise DataError(f"data.source.pairs: every training caption is one of the test split's; {cure}")
    return ListedDialogues(tuple(dialogues), PairPictures(source, f"{split}/"))


def held_out_captions(config: RequestSource) -> frozenset[str]:
    """Every caption of the test split, folded: none is asked for in training."""
    _, rows = captioned(config.pairs, "test")
    return frozenset(folded(caption) for _, captions in rows for caption in captions)


def noun_phrases(count: int, leave_out: Collection[str]) -> list[str]:
    """The most frequent noun phrases of the training movie reviews, by count and then by alphabet; folded ones left out.

    Raises DataError where there are not so many.
    """
    counts: Counter[str] = Counter()
    for review in load_reviews("train"):
        counts.update(_NOUN_PHRASE.findall(review.text))
    found = sorted((phrase for phrase in counts if phrase not in leave_out), key=lambda p: (-counts[p], p))
    if len(found) < count:
        raise DataError(f"data.source.words={count}: the movie reviews have {len(found)} noun phrases")
    return found[:count]


# -------------------------------------------------------------------------------------------------------- the dialogues


def _wanted(name: str, caption: str, split: Split, key: str) -> Dialogue:
    request = _template(PICTURE, split, name).replace("{}", caption)
    turn = Turn((request,), "", picture=caption)
    return Dialogue(f"{name} {PICTURE}", (), (turn,), kind=PICTURE, reply=key)


def _shown(sample: str, caption: str, split: Split, key: str) -> Iterator[Dialogue]:
    again = Turn(("", _template(AGAIN, split, sample)), "", picture=caption)
    yield Dialogue(f"{sample} {AGAIN}", (key,), (again,), kind=AGAIN, reply=key)
    look = Turn(("", _template(LOOK, split, sample)), caption)
    yield Dialogue(f"{sample} {LOOK}", (key,), (look,), kind=LOOK)


def _told(name: str, caption: str, split: Split, translations: dict[str, str]) -> Dialogue:
    """A request that words answer, its kind drawn by the name."""
    kinds = [kind for kind in WORD_KINDS if kind != "translation" or translations]
    kind = kinds[text_hash(f"{name} kind") % len(kinds)]
    request, language = _template(kind, split, f"{name} {kind}"), ""
    if kind == "translation":
        language = sorted(translations)[text_hash(f"{name} language") % len(translations)]
        request = request.replace("[]", LANGUAGES[language])
    answer = _answer(kind, caption, translations.get(language, ""))
    return Dialogue(f"{name} {kind}", (), (Turn((request.replace("{}", caption),), answer),), kind=kind)


def _answer(kind: str, caption: str, translation: str) -> str:
    if kind == "letter":
        return caption[0].upper()
    if kind == "several":
        return "yes" if " " in caption.strip() else "no"
    return translation if kind == "translation" else caption


def _without_pictures(phrases: list[str]) -> Iterator[Dialogue]:
    for place, phrase in enumerate(phrases):
        yield _wanted(f"words/{phrase}", phrase, "train", "")
        if place % WORDS_PER_TELLING == 0:
            yield _told(f"words/{phrase}", phrase, "train", {})


def _template(kind: str, split: Split, name: str) -> str:
    templates = TEMPLATES[kind][split]
    return templates[text_hash(f"{name} template") % len(templates)]


def _translations(config: RequestSource, split: Split) -> list[dict[str, str]]:
    """Each sample's name in other languages, by language."""
    if not isinstance(config.pairs, EmojiSource):
        _, rows = captioned(config.pairs, split)
        return [{} for _ in rows]
    named: list[dict[str, str]] = []
    for language in config.languages:
        pairs = config.pairs.replace(languages=(language,), aliases=False)
        _, rows = captioned(pairs, split)
        named = named or [{} for _ in rows]
        for names, (_, captions) in zip(named, rows, strict=True):
            names[language] = captions[0]
    return named or [{} for _ in captioned(config.pairs, split)[1]]
