"""Whether a description concludes another label than the one that it explains.

A rule over words, silent where it is not sure: only sentences that draw a conclusion count ("together
this suggests ..."), a word that is negated or only hinted at does not, and a description that concludes its
own label anywhere is right, whatever else it names. Emotions that lie close to each other do not
contradict. Other languages than English are not understood, and nothing is flagged in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cache.clip import Description, Record
from cache.labels import LABEL_FIELDS, LabelField, LabelSpace
from cache.manifest import Header

_BEFORE = 5
"""Words before a label that may negate it or hedge it."""
_TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|[,;:]")
_SENTENCE = re.compile(r"[^.!?]+")
_QUOTED = re.compile(
    r'"[^"]*"|“[^”]*”|«[^»]*»|「[^」]*」'
    # In single quotes, which are apostrophes between two letters.
    r"|(?<!\w)['\u2018](?:[^'\u2019]|['\u2019](?=\w))+['\u2019](?!\w)"
)
_POLES = {"positive": 1, "negative": -1, "neutral": 0}


def unquoted(text: str) -> str:
    """Return a text without what stands in quotes: somebody says that, not the description."""
    return _QUOTED.sub(" ", text)


class _Family(NamedTuple):
    """Words of one emotion."""

    polarity: int
    words: frozenset[str]


class _Vocabulary:
    """What the labels of one space are called."""

    def __init__(self, space: LabelSpace, families: Mapping[str, _Family], near: Any) -> None:
        self.space = space
        self.words: dict[str, frozenset[str]] = {}
        self.close: dict[str, frozenset[str]] = {}
        self.polarity: dict[str, int | None] = {}
        own_family: dict[str, set[str]] = {}
        for label in space.labels:
            names = {label, *(alias for alias, of in space.aliases.items() if of == label)}
            names = {name.lower() for name in names}
            of = {family for family, found in families.items() if names & found.words}
            own_family[label] = of
            self.words[label] = frozenset(names).union(*(families[family].words for family in of))
            poles = {families[family].polarity for family in of}
            poles |= {pole for word, pole in _POLES.items() if word in re.split(r"\W+", label)}
            self.polarity[label] = poles.pop() if len(poles) == 1 else None
        for label, of in own_family.items():
            friends = of.union(*(group for group in near if of & set(group)))
            self.close[label] = frozenset(
                other
                for other in space.labels
                if other == label or own_family[other] & friends or label in other or other in label
            )
        everything = frozenset().union(*self.words.values())
        self.any = _any_of(everything)


def _any_of(words: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)


class Contradictions:
    """The filter, for the label spaces of a manifest."""

    def __init__(self, header: Header, words: Mapping[str, Any]) -> None:
        """Prepare it.

        Args:
            header: Has the label spaces.
            words: `quality_words.json`.
        """
        self._header = header
        self._families = {
            name: _Family(told["polarity"], frozenset(told["words"].split()))
            for name, told in words["emotions"].items()
        }
        self._near = [frozenset(group) for group in words["near"]]
        self._negations = frozenset(words["negations"].split())
        self._hedges = frozenset(words["hedges"].split())
        self._breaks = frozenset(words["breaks"].split())
        self._conclusion = re.compile(words["conclusion"], re.IGNORECASE)
        self._intention = re.compile(words["intention"], re.IGNORECASE)
        self._vocabularies: dict[tuple[str, LabelField], _Vocabulary | None] = {}
        self._poles = self._polarity_words()
        self._any_pole = _any_of(frozenset(self._poles))

    def of(self, record: Record, description: Description) -> str | None:
        """Return how a description contradicts its label; None if it does not, or nobody can tell."""
        field = description.target
        if field is None:
            field = next((name for name in LABEL_FIELDS if record.labels_of(name)), None)
        if field is None:
            return None
        own = record.labels_of(field)
        if not own:
            return None
        vocabulary = self._vocabulary(record.corpus, field)
        if vocabulary is None:
            return None
        text = description.text
        if field == "sentiment" or vocabulary.space.open:
            return self._against_polarity(text, vocabulary, own)
        cue = self._intention if field == "intent" else self._conclusion
        return self._against_labels(text, vocabulary, own, cue)

    def _vocabulary(self, corpus: str, field: LabelField) -> _Vocabulary | None:
        key = (corpus, field)
        if key not in self._vocabularies:
            space = self._header.space(corpus, field)
            self._vocabularies[key] = (
                None if space is None else _Vocabulary(space, self._families, self._near)
            )
        return self._vocabularies[key]

    def _against_labels(
        self, text: str, vocabulary: _Vocabulary, own: tuple[str, ...], cue: re.Pattern[str]
    ) -> str | None:
        named = {word.lower() for word in vocabulary.any.findall(text)}
        mine = frozenset().union(*(vocabulary.words.get(label, frozenset()) for label in own))
        friends = set().union(*(vocabulary.close.get(label, frozenset()) for label in own))
        close = frozenset().union(*(vocabulary.words[label] for label in friends))
        if not named - close - mine:
            return None  # the common case: no other label is named at all
        concluded = self._concluded(text, vocabulary.any, cue)
        if not concluded or any(word in mine or word in close for word in concluded):
            return None
        word = concluded[-1]
        return f"concludes '{word}', the label is '{', '.join(own)}'"

    def _against_polarity(
        self, text: str, vocabulary: _Vocabulary, own: tuple[str, ...]
    ) -> str | None:
        known = [self._pole_of(label, vocabulary) for label in own]
        poles = {pole for pole in known if pole is not None}
        if len(poles) != 1 or None in known:
            return None
        mine = poles.pop()
        if vocabulary.space.open and mine == 0:
            return None
        concluded = self._concluded(text, self._any_pole, self._conclusion)
        if mine == 0:  # a feeling that is named may well go with a neutral attitude
            concluded = [word for word in concluded if word in _POLES]
        found = [(word, self._poles[word]) for word in concluded]
        if not found or any(pole == mine for _, pole in found):
            return None
        word, pole = found[-1]
        if pole == 0 and word != "neutral":
            return None
        return f"concludes '{word}', the label is '{', '.join(own)}'"

    def _pole_of(self, label: str, vocabulary: _Vocabulary) -> int | None:
        if label in vocabulary.polarity:
            return vocabulary.polarity[label]
        found = {f.polarity for f in self._families.values() if label in f.words}
        return found.pop() if len(found) == 1 else None

    def _polarity_words(self) -> dict[str, int]:
        found = dict(_POLES)
        for family in self._families.values():
            if family.polarity:
                found.update(dict.fromkeys(family.words, family.polarity))
        return found

    def _concluded(self, text: str, words: re.Pattern[str], cue: re.Pattern[str]) -> list[str]:
        """Return the words that a conclusion names behind its cue, neither negated nor hedged."""
        found = []
        for sentence in _SENTENCE.findall(unquoted(text)):
            begins = cue.search(sentence)
            if begins is None:
                continue
            for match in words.finditer(sentence, begins.end()):
                if not self._is_taken_back(sentence[: match.start()]):
                    found.append(match[0].lower())
        return found

    def _is_taken_back(self, before: str) -> bool:
        tokens = [token.lower() for token in _TOKEN.findall(before)]
        n = 0
        for token in reversed(tokens):
            if token in self._breaks or token in ";:":
                return False
            if token == ",":
                continue
            n += 1
            if n > _BEFORE:
                return False
            if token in self._negations or token in self._hedges or token.endswith("n't"):
                return True
        return False
