from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import SchemaError
from eval.parse import ParsedReply, parse_labels, parse_reply

LABELS = ("Happy", "sad", "neutral", "doubt/confusion")
ALIASES = {"joy": "Happy", "Joyful": "Happy", "sorrow": "sad", "sad": "neutral"}

TABLE = [
    # reply, label, how
    ("Happy", "Happy", "exact"),
    ("  HAPPY \n", "Happy", "exact"),
    ("happy.", "Happy", "exact"),
    ('"Happy."', "Happy", "exact"),
    ("'happy'!?", "Happy", "exact"),
    ("“happy”。", "Happy", "exact"),
    ("doubt/confusion", "doubt/confusion", "exact"),
    ("<answer>happy</answer>", "Happy", "tag"),
    ("<think>a smile, so <b>sad</b>?</think>\n<answer> Happy. </answer>", "Happy", "tag"),
    ("<ANSWER>sad</Answer>", "sad", "tag"),
    ("<answer>\n'sad'\n</answer> I hope this helps.", "sad", "tag"),
    # the last complete tag; what follows it does not count
    ("<answer>sad</answer> no: <answer>happy</answer>", "Happy", "tag"),
    ("<answer>sad</answer> or <answer>happy", "sad", "tag"),
    # nested tags: the innermost content
    ("<answer><answer>sad</answer></answer>", "sad", "tag"),
    ("<answer>either <answer>sad</answer>", "sad", "tag"),
    # an unclosed tag takes the rest
    ("because of the voice <answer>sad", "sad", "tag"),
    ("<answer>", None, "empty"),
    ("<answer></answer>", None, "empty"),
    ("happy <answer> . </answer>", None, "empty"),
    # a closing tag alone marks nothing
    ("happy</answer>", None, "off_list"),
    # aliases; a label wins over an alias of the same text
    ("joy", "Happy", "alias"),
    ("<answer>JOYFUL!</answer>", "Happy", "alias"),
    ("sad", "sad", "exact"),
    # no guessing
    ("not happy", None, "off_list"),
    ("happy, sad", None, "off_list"),
    ("The person is happy.", None, "off_list"),
    ("happyy", None, "off_list"),
    ("**happy**", None, "off_list"),
    ("hap\u200bpy", None, "off_list"),
    ("ｈａｐｐｙ", None, "off_list"),  # noqa: RUF001
    ("开心", None, "off_list"),
    ("<script>alert(1)</script>", None, "off_list"),
    ("\x00", None, "off_list"),
    # nothing there
    ("", None, "empty"),
    (" \n\t\u00a0\u3000", None, "empty"),
    ("...", None, "empty"),
    ('""', None, "empty"),
]


@pytest.mark.parametrize(("reply", "label", "how"), TABLE)
def test_the_table_of_replies(reply: str, label: str | None, how: str) -> None:
    parsed = parse_reply(reply, LABELS, ALIASES)
    assert (parsed.label, parsed.how) == (label, how)


def test_the_compared_text_is_kept() -> None:
    assert parse_reply("<answer> 'Straße' </answer>", LABELS) == ParsedReply(
        None, "off_list", "strasse"
    )


def test_casefold_reaches_labels_beyond_ascii() -> None:
    assert parse_reply("STRASSE", ["Straße"]).label == "Straße"
    assert parse_reply("开心。", ["开心"]).how == "exact"


@pytest.mark.parametrize(
    "reply",
    [
        "a" * 2_000_000,
        "<answer>" * 200_000,
        "<answer>" * 100_000 + "</answer>" * 100_000,
        "<" * 1_000_000,
        "\".'!" * 500_000,
        " " * 2_000_000,
    ],
    ids=["letters", "opening", "nested", "brackets", "quotes", "blanks"],
)
def test_hostile_length_takes_linear_time(reply: str) -> None:
    started = time.perf_counter()
    assert parse_reply(reply, LABELS, ALIASES).label is None
    assert time.perf_counter() - started < 5.0


@given(st.text())
def test_any_text_gives_a_label_or_a_reason(reply: str) -> None:
    parsed = parse_reply(reply, LABELS, ALIASES)
    assert (parsed.label is None) == (parsed.how in ("off_list", "empty"))
    assert (parsed.how == "empty") == (parsed.text == "")


@given(st.sampled_from(LABELS), st.text(alphabet=" \n\"'“”.!"), st.text(alphabet=" \n\"'“”.!?"))
def test_every_label_is_found_in_its_wrapping(label: str, before: str, after: str) -> None:
    before = before.replace(".", "").replace("!", "")  # punctuation is stripped at the end only
    assert parse_reply(f"{before}{label}{after}", LABELS).label == label


def test_an_ambiguous_label_space_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"'Sad' and 'sad\.' both read as 'sad'"):
        parse_reply("x", ["Sad", "sad."])
    with pytest.raises(SchemaError, match="has no letters left"):
        parse_reply("x", ["..."])


def test_a_dangling_alias_is_refused_with_the_near_miss() -> None:
    with pytest.raises(SchemaError, match=r"leads to 'happy'.*Did you mean 'Happy'"):
        parse_reply("x", LABELS, {"joy": "happy"})
    with pytest.raises(SchemaError, match="'joy' leads to 'Happy' and to 'sad'"):
        parse_reply("x", LABELS, {"joy": "Happy", "JOY": "sad"})


@pytest.mark.parametrize(
    ("reply", "labels", "how", "unread"),
    [
        ("happy, sad", ("happy", "sad"), "exact", ()),
        ("Sad; HAPPY.", ("happy", "sad"), "exact", ()),
        ("happy,happy , 'happy'", ("happy",), "exact", ()),
        ("<think>sad</think><answer>angry,\nhappy</answer>", ("happy", "angry"), "tag", ()),
        ("joyful, sad", ("happy", "sad"), "alias", ()),
        ("happy, so glad", ("happy",), "exact", ("so glad",)),
        ("not happy", (), "off_list", ("not happy",)),
        ("happy and sad", (), "off_list", ("happy and sad",)),
        ("happy\uff0csad\u3001angry", ("happy", "sad", "angry"), "exact", ()),
        (" ,; ", (), "empty", ()),
        ("", (), "empty", ()),
    ],
)
def test_several_labels(
    reply: str, labels: tuple[str, ...], how: str, unread: tuple[str, ...]
) -> None:
    found = parse_labels(reply, ("happy", "sad", "angry"), {"joyful": "happy"})
    assert (found.labels, found.how, found.unread) == (labels, how, unread)


def test_an_open_vocabulary_takes_any_word() -> None:
    found = parse_labels("Torn, joyful, sad", ("happy", "sad"), {"joyful": "happy"}, is_open=True)
    assert (found.labels, found.how, found.unread) == (("happy", "sad", "torn"), "alias", ())
    assert parse_labels("Torn", ("sad",), is_open=True).labels == ("torn",)
    assert parse_labels(" . ", ("sad",), is_open=True).how == "empty"


@given(st.lists(st.sampled_from(["happy", "sad", "angry"]), min_size=1, unique=True))
def test_what_an_answer_names_is_read_back(labels: list[str]) -> None:
    space = ("angry", "happy", "sad")
    found = parse_labels(", ".join(labels), space)
    assert found.labels == tuple(label for label in space if label in labels)


def test_a_long_list_takes_linear_time() -> None:
    assert parse_labels("sad, " * 200_000, ("sad",)).labels == ("sad",)
    assert len(parse_labels(",".join(map(str, range(100_000))), ("sad",)).unread) == 100_000
