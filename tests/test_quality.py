"""Quality filters: each flags what it should, is silent on good text, and says what it did."""

# ruff: noqa: RUF001  (texts in other scripts are what is tested)

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import DESCRIPTION_KINDS, Description, DescriptionKind, Record
from cache.errors import SchemaError
from cache.labels import LabelField, LabelSpace
from cache.manifest import Header, Manifest, read_manifest, write_manifest
from extract.annotate.people.quality import (
    FILTERS,
    Filter,
    QualityFilters,
    cleaned,
    examine,
    n_dropped,
    options_of,
)
from extract.annotate.prompts import load_prompt, prompt_names
from extract.corpora.demo import EMOTIONS, describe

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = (
    "import typer; from eval.verbs.review import quality_command\n"
    "app = typer.Typer(); app.command()(quality_command); app()"
)
SPACES = {
    "emotion": LabelSpace(
        name="emotions",
        labels=("happy", "sad", "angry", "neutral", "surprise", "fear", "disgust", "worried"),
        aliases={"joyful": "happy", "sorrow": "sad"},
    ),
    "meld/emotion": LabelSpace(
        name="meld",
        labels=("neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"),
    ),
    "emotion_multi": LabelSpace(name="multi", labels=("happy", "sad", "angry", "fear")),
    "emotion_ov": LabelSpace(name="any words", labels=("happy",), open=True),
    "sentiment": LabelSpace(name="polarity", labels=("negative", "neutral", "positive")),
    "intent": LabelSpace(name="intents", labels=("questioning", "agreeing", "consoling")),
}
HEADER = Header(media_root=".", label_spaces=SPACES)
GOOD = (
    "The person sits upright and looks past the camera with drawn brows. The voice is low and slow, and "
    "it trembles at the end of the sentence, while the words themselves speak of a farewell. "
)


def prompt_texts() -> list[str]:
    prompts = [load_prompt(name) for name in prompt_names()]
    return [prompt.file.text for prompt in prompts if prompt.role != "template"]


FILTERS_OF = {
    name: QualityFilters(HEADER, options_of(name), prompt_texts())
    for name in ("mmeverse", "merr-coarse")
}


def record_of(
    text: str,
    kind: DescriptionKind = "multimodal",
    *,
    target: LabelField | None = None,
    uid: str = "c/1",
    **fields: object,
) -> Record:
    description = Description(kind=kind, text=text, target=target)
    found = {"uid": uid, "media": "clips/a.mp4", "descriptions": (description,), **fields}
    return Record.model_validate(found)


def flagged(record: Record, preset: str = "mmeverse") -> dict[Filter, str]:
    findings = FILTERS_OF[preset].check(record).get(0, [])
    return {finding.filter: finding.why for finding in findings}


def against(label: str, end: str, field: LabelField = "emotion", corpus: str = "c") -> str | None:
    """Return what the contradiction filter says of a description that ends so."""
    value = tuple(label.split("+")) if field in ("emotion_multi", "emotion_ov") else label
    record = record_of(GOOD + end, target=field, uid=f"{corpus}/1", **{field: value})
    found = flagged(record)
    assert set(found) <= {"contradiction"}, found
    return found.get("contradiction")


# ---------------------------------------------------------------------------- good text


def test_good_descriptions_are_not_flagged() -> None:
    texts: list[tuple[str, DescriptionKind, str]] = [
        (GOOD + "Together these cues suggest that the person feels sad.", "multimodal", "sad"),
        ("AU01 (inner brow raiser), AU04 (brow lowerer)", "visual_expression", "sad"),
        (
            "A woman stands in a kitchen. She holds a cup with both hands and looks at a man who sits at "
            "the table; the light comes from a window behind her.",
            "visual_objective",
            "neutral",
        ),
        (
            "The voice starts low, rises quickly, and breaks off before the last word.",
            "audio_tone",
            "fear",
        ),
        (
            "She says \"I'm sorry, I can't help you\" and turns away. Her voice is flat and her eyes are "
            "cast down, which together suggest sadness.",
            "multimodal",
            "sad",
        ),
        (
            "The person says “在七个小时内就会如此” in a raised voice and slams the door behind them. This "
            "conveys anger.",
            "multimodal",
            "angry",
        ),
    ]
    for text, kind, label in texts:
        assert flagged(record_of(text, kind, emotion=label)) == {}, text


def test_the_descriptions_of_the_demo_are_not_flagged() -> None:
    labels = tuple(EMOTIONS)
    header = Header(media_root=".", label_spaces={"emotion": LabelSpace(name="e", labels=labels)})
    filters = QualityFilters(header, options_of("mmeverse"), prompt_texts())
    for label in EMOTIONS:
        record = record_of(describe(label), emotion=label, target="emotion")
        assert filters.check(record) == {}, label
        # Every other label contradicts, unless it is close.
        for other in EMOTIONS:
            findings = filters.check(record_of(describe(other), emotion=label, target="emotion"))
            is_close = {label, other} in (
                {"happy", "surprised"}, {"surprised", "fearful"}
            ) or label == other  # fmt: skip
            assert bool(findings) != is_close, (label, other)


# ---------------------------------------------------------------------------- length, language


@pytest.mark.parametrize(
    ("kind", "text", "is_flagged"),
    [
        ("multimodal", "Sad.", True),
        ("multimodal", GOOD, False),
        ("multimodal", " ".join(f"word{k} of a" for k in range(90)), True),
        ("visual_expression", "AU12 (smile)", False),
        ("visual_expression", "smile", True),
        ("audio_tone", "low and slow voice", True),
    ],
)
def test_length(kind: DescriptionKind, text: str, is_flagged: bool) -> None:
    assert ("length" in flagged(record_of(text, kind))) == is_flagged


def test_length_counts_characters_where_there_are_no_spaces() -> None:
    filters = QualityFilters(HEADER, options_of("mmeverse", language="zh"))
    long_enough = "这个人坐在桌子旁边看着镜头眉头紧皱声音低沉而缓慢最后一句话有些颤抖"
    assert filters.check(record_of(long_enough)) == {}
    assert filters.check(record_of(long_enough[:12]))[0][0].filter == "length"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "这个人坐在桌子旁边看着镜头，眉头紧皱，声音低沉而缓慢，最后一句话有些颤抖。",
            "another script",
        ),
        (
            "Человек сидит прямо и смотрит мимо камеры, его голос тихий и медленный.",
            "another script",
        ),
        (
            "Die Person sitzt aufrecht und blickt mit zusammengezogenen Brauen an der Kamera vorbei, die "
            "Stimme ist tief und langsam.",
            "'de'",
        ),
        (
            "La persona está sentada y mira a la cámara con las cejas fruncidas; la voz es baja y lenta al "
            "final de la frase.",
            "'es'",
        ),
        (
            "Kişi dik oturuyor ve kameranın ötesine bakıyor, kaşları çatık, sesi alçak ve yavaş, cümlenin "
            "sonunda titriyor ve sonra susuyor.",
            "only",
        ),
    ],
)
def test_language(text: str, words: str) -> None:
    assert words in flagged(record_of(text)).get("language", "")


def test_any_language_may_be_wanted_or_none() -> None:
    german = (
        "Die Person sitzt aufrecht und blickt an der Kamera vorbei, die Stimme ist tief und langsam "
        "und zittert am Ende des Satzes."
    )
    for language, is_flagged in (("de", False), (None, False), ("en", True), ("zh", True)):
        filters = QualityFilters(HEADER, options_of("mmeverse", language=language))
        assert bool(filters.check(record_of(german))) == is_flagged, language
    with pytest.raises(SchemaError, match="no 'xx'"):
        options_of("mmeverse", language="xx")


# ---------------------------------------------------------------------------- contradiction


@pytest.mark.parametrize(
    ("label", "end"),
    [
        ("sad", "Together, these cues point to happiness."),
        ("sad", "Overall, the person feels joyful."),
        ("happy", "This suggests anger."),
        ("happy", "Overall the person feels angry, not happy."),
        ("neutral", "The tense voice and the frown indicate anger."),
        ("angry", "In conclusion, the emotional state is neutral."),
        ("surprise", "Face and voice together convey disgust."),
        ("worried", "Overall, the mood is one of joy: the feeling is happiness."),
    ],
)
def test_another_emotion_as_the_conclusion(label: str, end: str) -> None:
    why = against(label, end)
    assert why is not None
    assert f"'{label}'" in why


@pytest.mark.parametrize(
    ("label", "end"),
    [
        ("sad", "Together, these cues point to sorrow."),
        ("sad", "Although others seem happy, together this suggests grief."),
        ("sad", "This does not suggest happiness."),
        ("sad", "Overall, the person feels not happy but sad."),
        ("sad", "The smile looks happy at first."),  # no conclusion is drawn
        ("sad", "Overall, the person hides the sadness behind a happy face."),
        ("sad", "Overall, there is no trace of anger."),
        ("sad", "This suggests worry."),  # close to it
        ("happy", "Overall the person feels both joy and surprise."),
        ("happy", "This conveys excitement."),  # no label of the space
        ("angry", "This suggests disgust rather than calm."),
        ("neutral", "Overall there is only a slight hint of anger."),
        ("neutral", "Overall the person feels calm, neither sad nor angry."),
        ("fear", 'Overall, "I am so happy" is said.'),
        ("worried", "Overall the person feels anxious and sad."),
    ],
)
def test_what_is_no_contradiction(label: str, end: str) -> None:
    assert against(label, end) is None


def test_labels_are_known_by_the_corpus_space_and_its_aliases() -> None:
    assert against("joy", "Overall, the person feels happy.", corpus="meld") is None
    assert against("sadness", "Overall, the person feels happy.", corpus="meld") is not None
    assert against("sad", "Overall, the person feels joyful.") is not None


@pytest.mark.parametrize(
    ("field", "label", "end", "is_flagged"),
    [
        ("sentiment", "positive", "Overall, the sentiment is negative.", True),
        ("sentiment", "positive", "Overall, the person feels sad.", True),
        ("sentiment", "positive", "Overall, the attitude is not negative.", False),
        ("sentiment", "positive", "Overall, the person feels joy.", False),
        ("sentiment", "positive", "Overall sad words, and yet the attitude is positive.", False),
        ("sentiment", "negative", "This conveys a positive attitude.", True),
        ("sentiment", "neutral", "This conveys a positive attitude.", True),
        ("sentiment", "neutral", "This conveys sadness in a neutral way.", False),
        ("sentiment", "neutral", "This conveys sadness.", False),
        ("emotion_multi", "sad+angry", "Overall, the person feels sad.", False),
        ("emotion_multi", "sad+angry", "Overall, the person feels happy.", True),
        (
            "emotion_ov",
            "sad+lonely",
            "Overall, the person feels happy.",
            False,
        ),  # lonely is unknown
        ("emotion_ov", "sad+afraid", "Overall, the person feels happy.", True),
        ("emotion_ov", "sad+happy", "Overall, the person feels happy.", False),
        ("intent", "consoling", "The intent is questioning.", True),
        ("intent", "consoling", "The intent is consoling, by questioning.", False),
        ("intent", "consoling", "Overall this suggests questioning eyes.", False),
    ],
)
def test_contradiction_of_each_kind_of_label(
    field: LabelField, label: str, end: str, is_flagged: bool
) -> None:
    assert (against(label, end, field) is not None) == is_flagged


def test_clues_and_records_without_labels_contradict_nothing() -> None:
    end = "Overall, the person feels happy."
    assert flagged(record_of(GOOD + end, "audio_tone", emotion="sad")) == {}
    assert flagged(record_of(GOOD + end)) == {}
    # Without a target, the first label that there is.
    assert "contradiction" in flagged(record_of(GOOD + end, emotion="sad"))


# ---------------------------------------------------------------------------- the other filters


@pytest.mark.parametrize("name", [n for n in prompt_names() if load_prompt(n).role != "template"])
def test_a_copied_prompt(name: str) -> None:
    prompt = load_prompt(name)
    slots = {"label": "sad"} if "label" in prompt.slots else {}
    text = prompt.render(slots)[0]
    words = text.split()
    for start in (0, len(words) // 2, len(words) - 30):
        found = flagged(record_of(" ".join(words[start : start + 30])))
        assert "copied" in found, (name, start)


def test_the_words_of_a_template_and_of_slots_are_no_copy() -> None:
    template = load_prompt("merr-coarse")
    made, _ = template.render(
        {
            "visual_objective": "A man sits at a table in a dark room and looks at a letter.",
            "audio_tone": "The voice is low and slow.",
            "subtitle": "She said that she would come.",
            "label": "sad",
        }
    )
    assert flagged(record_of(made, emotion="sad"), "merr-coarse") == {}
    filters = QualityFilters(
        HEADER, options_of("mmeverse"), ["One two three {{ x }} four five six"]
    )
    assert filters.check(record_of(GOOD + "One two three four five six.")) == {}


@pytest.mark.parametrize(
    ("text", "is_flagged"),
    [
        (GOOD + "The person looks away. " * 3, True),
        ("The voice is low. " * 9, True),
        ("sad and sad and sad and sad and sad and sad and sad and sad", True),
        (GOOD + "And the person sits upright and looks on.", False),
        (GOOD, False),
    ],
)
def test_repetition(text: str, is_flagged: bool) -> None:
    assert ("repetition" in flagged(record_of(text))) == is_flagged


@pytest.mark.parametrize(
    ("fields", "text", "is_flagged"),
    [
        ({"uid": "meld/dia1_utt3"}, "In dia1_utt3 she smiles.", True),
        ({"uid": "meld/dia1_utt3"}, "In dia1_utt33 she smiles.", False),
        ({"media": "x/Ses05F_impro01.avi"}, "The clip SES05F_IMPRO01 shows it.", True),
        ({"speaker": "Monica"}, "Monica smiles.", False),  # a name, which subtitles may tell
        ({"speaker": "speaker_07"}, "It is speaker_07 who smiles.", True),
        ({"uid": "c/1990"}, "It is 1990 on the calendar.", False),
        ({"uid": "c/000123"}, "Sample 000123 shows a man.", True),
        ({}, "The file clip_7.mp4 shows a man.", True),
        ({}, "He sits at the table. And then he smiles.", False),
    ],
)
def test_leaked_ids(fields: dict[str, str], text: str, is_flagged: bool) -> None:
    uid = fields.pop("uid", "c/1") if fields else "c/1"
    assert ("ids" in flagged(record_of(text, "audio_tone", uid=uid, **fields))) == is_flagged


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I do not have feelings.",
        "I'm sorry, but I can't assist with that request.",
        "I cannot determine the emotion of this person.",
        "I am unable to see the face.",
        "Unfortunately, I’m not able to view videos.",
        "The provided image shows a man at a table.",
        "In the given video clip the man smiles.",
        "Based on the clues, the man is happy.",
        "The audio you sent holds no voice.",
        "Sure! Here is the description:",
        "Certainly, here's what the frame shows:",
        "A man smiles. Let me know if you need more.",
        '{"description": "A man smiles."}',
        "**Emotion**: a man smiles.",
        "<think>The man smiles.</think> He is happy.",
        "A man smiles.<|im_end|>",
        "```json a man smiles```",
        "# A man smiles",
        "A man smiles.<img src=x>",
    ],
)
def test_refusals_and_talk_about_the_task(text: str) -> None:
    assert "meta" in flagged(record_of(text, "audio_tone"))


@pytest.mark.parametrize(
    "text",
    [
        'He says "As an AI I cannot help" into a toy telephone.',
        "He whispers 'I can't see anything in here' and gropes for the wall.",
        "She models a dress and looks into the camera of the photographer.",
        "The label on the bottle is red; she holds it above her head.",
        "He reads the instructions aloud and follows them, sure of himself.",
        "A sign reads: 3 > 2, and #7 is painted on the car.",
        "She is following the ball with her eyes; above her hangs a given number of lamps.",
    ],
)
def test_what_only_looks_like_it(text: str) -> None:
    assert "meta" not in flagged(record_of(text, "audio_tone"))


@given(st.text(max_size=300), st.sampled_from(DESCRIPTION_KINDS))
def test_no_text_makes_the_filters_fail(text: str, kind: DescriptionKind) -> None:
    if text:
        record = record_of(text, kind, emotion="sad", sentiment="negative")
        for finding in FILTERS_OF["mmeverse"].check(record).get(0, []):
            assert finding.filter in FILTERS


# ---------------------------------------------------------------------------- all together


def records_with_shared_texts(n: int) -> list[Record]:
    shared = "The voice is low and slow, with a pause before the last word."
    return [
        record_of(
            shared if number < n else f"{shared} It is number {number} of all of them.",
            "audio_tone",
            uid=f"c/{number}",
        )
        for number in range(8)
    ]


@pytest.mark.parametrize(("n", "expected"), [(4, 0), (5, 5), (8, 8)])
def test_the_same_text_for_many_records(n: int, expected: int) -> None:
    report, flags = examine(records_with_shared_texts(n), FILTERS_OF["mmeverse"])
    found = {entry.filter: entry for entry in report.filters}["shared"]
    assert (found.n_descriptions, found.n_records) == (expected, expected)
    assert len(flags) == expected
    if expected:
        assert found.examples[0].why == f"the text of {n} records"


def test_expressions_made_by_rule_may_be_shared() -> None:
    records = [
        record_of("AU12 (lip corner puller)", "visual_expression", uid=f"c/{k}") for k in range(9)
    ]
    assert examine(records, FILTERS_OF["mmeverse"])[1] == {}


def mixed_records() -> list[Record]:
    """Return records of which the even ones have one bad description out of two."""
    bad = ["Sad.", "I cannot identify the emotion of people.", GOOD + "This suggests joy."]
    return [
        Record(
            uid=f"c/{number}",
            media=f"{number}.mp4",
            emotion="sad",
            descriptions=(
                Description(
                    kind="audio_tone", text=f"A low voice, as of number {number} at least."
                ),
                Description(
                    kind="multimodal",
                    text=f"{GOOD} It is number {number}. Overall this is sadness."
                    if number % 2
                    else bad[number // 2 % 3],
                    target="emotion",
                ),
            ),
        )
        for number in range(12)
    ]


def test_flagged_descriptions_go_and_records_stay() -> None:
    records = mixed_records()
    report, flags = examine(records, FILTERS_OF["mmeverse"])
    assert (report.n_records, report.n_descriptions) == (12, 24)
    assert (report.n_flagged, report.n_flagged_records) == (6, 6)
    counts = {entry.filter: entry.n_descriptions for entry in report.filters}
    # "Sad." and the refusal are too short as well.
    assert counts | {"shared": 0} == {
        **dict.fromkeys(FILTERS, 0), "length": 4, "meta": 2, "contradiction": 2
    }  # fmt: skip
    assert all(len(entry.examples) <= 3 for entry in report.filters)
    kept = list(cleaned(records, flags))
    assert [record.uid for record in kept] == [record.uid for record in records]
    assert [len(record.descriptions) for record in kept] == [1, 2] * 6
    assert all(
        record.model_copy(update={"descriptions": ()})
        == before.model_copy(update={"descriptions": ()})
        for record, before in zip(kept, records, strict=True)
    )
    assert examine(kept, FILTERS_OF["mmeverse"])[0].n_flagged == 0
    # What a filter that is kept flagged stays, unless another one flagged it, too.
    assert n_dropped(flags, {"contradiction"}) == 4
    assert n_dropped(flags, {"length"}) == 4
    assert n_dropped(flags, set(FILTERS)) == 0


def run(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "160"},
    )  # fmt: skip


def test_the_verb_reports_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "in" / "m.parquet"
    path.parent.mkdir()
    records = mixed_records()
    header = HEADER.model_copy(update={"media_root": "clips"})
    write_manifest(path, Manifest(header=header, records=tuple(records)))
    told = run(["in/m.parquet", "--out", "clean.parquet"], tmp_path)
    assert told.returncode == 1, told.stderr
    for words in ("24 descriptions of 12 records", "concludes 'joy'", "c/2, multimodal (emotion)"):
        assert words in told.stdout
    assert "6 flagged ones dropped, 0 flagged ones kept" in told.stderr
    found = read_manifest(tmp_path / "clean.parquet")
    assert found.header.media_root == "in/clips"
    assert found.header.label_spaces == header.label_spaces
    assert sum(len(record.descriptions) for record in found.records) == 18
    clean = run(["clean.parquet"], tmp_path)
    assert clean.returncode == 0, clean.stdout
    told = run(
        ["in/m.parquet", "--out", "kept.parquet", "--keep-flagged", "all", "--json"], tmp_path
    )
    assert json.loads(told.stdout)["n_flagged"] == 6
    assert "0 flagged ones dropped, 6 flagged ones kept" in told.stderr
    assert read_manifest(tmp_path / "kept.parquet").records == tuple(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.parquet"], "no such manifest"),
        (["m.parquet", "--out", "m.parquet"], "is the manifest that is read"),
        (["m.parquet", "--out", "."], "is a folder"),
        (["m.parquet", "--keep-flagged", "lenght"], "Did you mean 'length'"),
        (["m.parquet", "--preset", "mmevrse"], "Did you mean 'mmeverse'"),
        (["m.parquet", "--language", "klingon"], "no 'klingon'"),
        (["m.parquet", "--prompts", "nowhere"], "no such folder"),
    ],
)
def test_the_verb_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(path, Manifest(header=HEADER, records=()))
    before = path.read_bytes()
    told = run(arguments, tmp_path)
    assert told.returncode == 2
    assert message in told.stderr
    assert path.read_bytes() == before
