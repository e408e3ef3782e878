"""Small copies of MMEVerse's tables, and the records that must come of them.

A table has the columns that the released code reads. Each is written as CSV, JSON and JSONL, and under
the three names that the code knows: merged (stage 1), label (evaluation) and AU_gpt (stage 2).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cells = dict[str, str]
VISUAL, REASONER, QWEN = "response_Qwen25vl_72B", "response_AudioReasoner", "response_Qwen2Audio"


@dataclass(frozen=True)
class Table:
    """One corpus's table."""

    corpus: str
    name: str
    """Of its files, in front of `_merged.csv`."""
    rows: Sequence[Cells]
    """In order; every row has the same columns."""
    expected: Sequence[dict[str, Any]]
    """The records, without descriptions and peak; a row that is no part of the corpus has none."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Id in the table -> frame."""
    stage2: dict[str, Cells] = field(default_factory=dict)
    """Id -> what the stage 2 table says."""
    told: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Uid -> descriptions of the merged table."""
    told2: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Uid -> descriptions of the stage 2 table."""
    kinds: tuple[str, ...] = ("merged", "label", "stage2")
    extra: dict[str, str] = field(default_factory=dict)
    """Other files, by name."""
    media: str = "video/{}.mp4"


def visual(text: str) -> dict[str, str]:
    """Return a description as the vision-language model gave it."""
    return {"kind": "visual_objective", "text": text, "model": "Qwen2.5-VL-72B"}


def tone(text: str, model: str = "Qwen2-Audio") -> dict[str, str]:
    """Return a description of the voice."""
    return {"kind": "audio_tone", "text": text, "model": model}


def merged(text: str, target: str) -> dict[str, str]:
    """Return a consolidated description."""
    return {"kind": "multimodal", "text": text, "target": target, "model": "gpt-4o-mini"}


def said(text: str, language: str | None = "en", origin: str | None = None) -> dict[str, str]:
    """Return a subtitle."""
    found = {"text": text}
    if language:
        found["language"] = language
    if origin:
        found["origin"] = origin
    return found


def write_rows(path: Path, rows: Sequence[Cells]) -> None:
    """Write a table in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_table(table: Table, folder: Path, kind: str, suffix: str) -> list[dict[str, Any]]:
    """Write one of a table's files, its peaks and what belongs to it; return the records."""
    rows = list(table.rows)
    ids = [row["video_id"] for row in rows]
    if kind == "label" and table.corpus == "mosei":
        rows = [
            {**row, "video_id": i.rpartition("_")[0], "clip_id": i.rpartition("_")[2]}
            for row, i in zip(rows, ids, strict=True)
        ]
    if kind == "stage2":
        columns = next(iter(table.stage2.values()), {})
        rows = [
            {**row, **table.stage2.get(i, dict.fromkeys(columns, ""))}
            for row, i in zip(rows, ids, strict=True)
        ]
    stem = {"merged": "merged", "label": "label", "stage2": "AU_gpt"}[kind]
    write_rows(folder / f"{table.name}_{stem}.{suffix}", rows)
    if kind == "merged" and table.stage2:
        beside = [{"video_id": i, **cells} for i, cells in table.stage2.items()]
        write_rows(folder / "AU_gpt" / f"{table.name}_AU_gpt.{suffix}", beside)
    peak_name = f"{table.name}_AU_peak.json" if kind == "stage2" else f"{table.name}_peak.json"
    if table.peaks:
        peaks = {i: {"peak_index": frame} for i, frame in table.peaks.items()}
        (folder / peak_name).write_text(json.dumps(peaks))
    for name, text in table.extra.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = []
    for record in table.expected:
        uid = record["uid"]
        source_id = uid.partition("/")[2]
        told = list(table.told.get(uid, ()))
        if kind in ("merged", "stage2"):
            told += table.told2.get(uid, ())
        complete = {**record, "media": table.media.format(source_id)}
        peak = {i.zfill(len(source_id)): n for i, n in table.peaks.items()}.get(source_id)
        if peak is not None:
            complete["peak"] = {"index": peak}
        if told:
            complete["descriptions"] = told
        found.append(complete)
    return found


TABLES = (
    Table(
        "meld",
        "MELD",
        rows=[
            {"video_id": "train_dia0_utt0", "Emotion": "sadness", "Sentiment": "negative",
             "text": "Oh, no.",
             "mode": "train", REASONER: "A low voice.", QWEN: "Slow, quiet.", VISUAL: "A kitchen."},
            {"video_id": "dev_dia3_utt1", "Emotion": "Joy", "Sentiment": "positive", "text": "Yes, “yes”!",
             "mode": "dev", REASONER: "", QWEN: "", VISUAL: ""},
            {"video_id": "test_dia0_utt0", "Emotion": "neutral", "Sentiment": "neutral", "text": "",
             "mode": "test", REASONER: "", QWEN: "Even.", VISUAL: ""},
        ],
        expected=[
            {"uid": "meld/train_dia0_utt0", "split": "train", "split_native": "train", "emotion": "sad",
             "sentiment": "negative", "parent": "train_dia0", "subtitles": [said("Oh, no.")]},
            {"uid": "meld/dev_dia3_utt1", "split": "val", "split_native": "dev", "emotion": "joy",
             "sentiment": "positive", "parent": "dev_dia3", "subtitles": [said("Yes, “yes”!")],
             "benchmarks": ["meld-s"]},
            {"uid": "meld/test_dia0_utt0", "split": "test", "split_native": "test", "emotion": "neutral",
             "sentiment": "neutral", "parent": "test_dia0", "benchmarks": ["meld-e", "meld-s"]},
        ],
        peaks={"train_dia0_utt0": 17, "test_dia0_utt0": 0},
        stage2={"train_dia0_utt0": {"gpt-4o-mini_Emotion": "Sad, since the voice is low.",
                                    "gpt-4o-mini_Sentiment": "Negative, as the voice drops."}},
        told={"meld/train_dia0_utt0": [visual("A kitchen."), tone("A low voice.", "Audio-Reasoner"),
                                       tone("Slow, quiet.")],
              "meld/test_dia0_utt0": [tone("Even.")]},
        told2={"meld/train_dia0_utt0": [merged("Sad, since the voice is low.", "emotion"),
                                        merged("Negative, as the voice drops.", "sentiment")]},
    ),
    Table(
        "mer2023",
        "MER2024",
        rows=[
            {"video_id": "sample_00000001", "emotion_label": "worried", "english": "What now?",
             "chinese": "现在怎么办", "MER2023_mode": "train",
             "MER2024_mode": "train", VISUAL: "A street."},
            {"video_id": "sample_00003364", "emotion_label": "Happy", "english": "", "chinese": "好",
             "MER2023_mode": "test1", "MER2024_mode": "train", VISUAL: ""},
            {"video_id": "samplenew3_00037970", "emotion_label": "sad", "english": "", "chinese": "走",
             "MER2023_mode": "other", "MER2024_mode": "test_semi", VISUAL: ""},
            {"video_id": "sample_00005000", "emotion_label": "sad", "english": "", "chinese": "来",
             "MER2023_mode": "test2", "MER2024_mode": "train", VISUAL: ""},
        ],
        expected=[
            {"uid": "mer2023/sample_00000001", "split": "train", "split_native": "train", "language": "zh",
             "split_axes": {"MER2023_mode": "train", "MER2024_mode": "train"}, "emotion": "worried",
             "subtitles": [said("现在怎么办", "zh"), said("What now?", "en", "translation")]},
            {"uid": "mer2023/sample_00003364", "split": "test", "split_native": "test1", "language": "zh",
             "split_axes": {"MER2023_mode": "test1", "MER2024_mode": "train"}, "emotion": "happy",
             "subtitles": [said("好", "zh")], "benchmarks": ["mer2023"]},
        ],
        peaks={"sample_00000001": 4},
        stage2={"sample_00000001": {"gpt-4o-mini_Emotion": "Worried brows."}},
        told={"mer2023/sample_00000001": [visual("A street.")]},
        told2={"mer2023/sample_00000001": [merged("Worried brows.", "emotion")]},
    ),
    Table(
        "mer2024",
        "MER2024",
        rows=[
            {"video_id": "sample_00000001", "emotion_label": "worried", "chinese": "现在怎么办",
             "MER2023_mode": "train", "MER2024_mode": "train"},
            {"video_id": "samplenew3_00037970", "emotion_label": "sad", "chinese": "走",
             "MER2023_mode": "other", "MER2024_mode": "test_semi"},
        ],
        expected=[
            {"uid": "mer2024/samplenew3_00037970", "split": "test", "split_native": "test_semi",
             "language": "zh", "split_axes": {"MER2023_mode": "other", "MER2024_mode": "test_semi"},
             "emotion": "sad", "subtitles": [said("走", "zh")], "benchmarks": ["mer2024"]},
        ],
        peaks={"samplenew3_00037970": 3, "sample_00000001": 2},
        kinds=("merged", "label"),
    ),
    Table(
        "iemocap",
        "IEMOCAP",
        rows=[
            {"video_id": "Ses01F_impro01_F000", "official_label": "frustration", "text": "Excuse me.",
             "session": "1"},
            {"video_id": "Ses05F_impro03_F000", "official_label": "Excited", "text": "Wow.",
             "session": "5"},
            {"video_id": "Ses05M_script01_1b_MXX0", "official_label": "Fear", "text": "", "session": "5"},
            {"video_id": "Ses04M_impro01_M000", "official_label": "xxx", "text": "Hm.", "session": "4"},
        ],
        expected=[
            {"uid": "iemocap/Ses01F_impro01_F000", "split": "train", "emotion": "frustration",
             "split_axes": {"session": "1", "speaker": "Ses01_F"}, "parent": "Ses01F_impro01",
             "speaker": "Ses01_F", "subtitles": [said("Excuse me.")]},
            {"uid": "iemocap/Ses05F_impro03_F000", "split": "test", "emotion": "excited",
             "split_axes": {"session": "5", "speaker": "Ses05_F"}, "parent": "Ses05F_impro03",
             "speaker": "Ses05_F", "subtitles": [said("Wow.")], "benchmarks": ["iemocap"]},
            {"uid": "iemocap/Ses05M_script01_1b_MXX0", "split": "test", "emotion": "fear",
             "split_axes": {"session": "5", "speaker": "Ses05_M"}, "parent": "Ses05M_script01_1b",
             "speaker": "Ses05_M"},
            {"uid": "iemocap/Ses04M_impro01_M000", "split": "train",
             "split_axes": {"session": "4", "speaker": "Ses04_M"}, "parent": "Ses04M_impro01",
             "speaker": "Ses04_M", "subtitles": [said("Hm.")]},
        ],
    ),
    Table(
        "caer",
        "CAER",
        rows=[
            {"video_id": "train_Anger_0002", "emotion_label": "Anger", "text_whisper": "Get out!",
             "mode": "train"},
            {"video_id": "validation_Sad_0001", "emotion_label": "Sad", "text_whisper": "",
             "mode": "validation"},
            {"video_id": "test_Surprise_0083", "emotion_label": "Surprise", "text_whisper": "",
             "mode": "test"},
        ],
        expected=[
            {"uid": "caer/train_Anger_0002", "split": "train", "split_native": "train", "emotion": "anger",
             "subtitles": [said("Get out!", "en", "asr:whisper")]},
            {"uid": "caer/validation_Sad_0001", "split": "val", "split_native": "validation",
             "emotion": "sad",
             "benchmarks": ["caer"]},
            {"uid": "caer/test_Surprise_0083", "split": "test", "split_native": "test",
             "emotion": "surprise",
             "benchmarks": ["caer"]},
        ],
    ),
    Table(
        "e3",
        "E3",
        rows=[
            {"video_id": "x-6CtPWVi6E_0208_1", "emotion": "sarcastic", "conversation": "Great.",
             "person": "The man in black", "mode": "train"},
            {"video_id": "a_b_0001_2", "emotion": "anger", "conversation": "", "person": "", "mode": "val"},
            {"video_id": "zz_0001_2", "emotion": "shy", "conversation": "", "person": "", "mode": "test"},
        ],
        expected=[
            {"uid": "e3/x-6CtPWVi6E_0208_1", "split": "train", "split_native": "train",
             "emotion": "sarcastic",
             "person": "The man in black", "parent": "x-6CtPWVi6E", "subtitles": [said("Great.", None)]},
            {"uid": "e3/a_b_0001_2", "split": "val", "split_native": "val", "emotion": "angry",
             "parent": "a_b", "benchmarks": ["e3"]},
            {"uid": "e3/zz_0001_2", "split": "test", "split_native": "test", "emotion": "shy",
             "parent": "zz", "benchmarks": ["e3"]},
        ],
    ),
    Table(
        "dfew",
        "DFEW",
        rows=[
            {"video_id": "77", "label": "anger", "sentence": "Go.", "mode": "train"},
            {"video_id": "16372", "label": "angry", "sentence": "", "mode": "test"},
        ],
        expected=[
            {"uid": "dfew/77", "split": "train", "split_native": "train", "emotion": "angry",
             "subtitles": [said("Go.", None, "asr:whisper")]},
            {"uid": "dfew/16372", "split": "test", "split_native": "test", "emotion": "angry",
             "benchmarks": ["dfew"]},
        ],
    ),
    Table(
        "mafw",
        "MAFW",
        rows=[
            # A spreadsheet took the zeros away.
            {"video_id": "22", "single_label": "anger", "multi_label": "anger,disgust", "text_whisper": "",
             "mode": "train"},
            {"video_id": "00050", "single_label": "helplessness", "multi_label": "",
             "text_whisper": "So...",
             "mode": "test"},
            {"video_id": "12345", "single_label": "fear", "multi_label": "fear,surprise",
             "text_whisper": "",
             "mode": "test"},
        ],
        expected=[
            {"uid": "mafw/00022", "split": "train", "split_native": "train", "emotion": "anger",
             "emotion_multi": ["anger", "disgust"]},
            {"uid": "mafw/00050", "split": "test", "split_native": "test", "emotion": "helplessness",
             "subtitles": [said("So...", None, "asr:whisper")], "benchmarks": ["mafw"]},
            {"uid": "mafw/12345", "split": "test", "split_native": "test", "emotion": "fear",
             "emotion_multi": ["fear", "surprise"], "benchmarks": ["mafw", "mafw-m"]},
        ],
        peaks={"22": 9},
        stage2={"22": {"gpt-4o-mini_Single": "Anger.", "gpt-4o-mini_Multi": "Anger and disgust."}},
        told2={"mafw/00022": [merged("Anger.", "emotion"), merged("Anger and disgust.", "emotion_multi")]},
    ),
    Table(
        "mc-eiu",
        "MC-EIU",
        rows=[
            {"video_id": "dia_622_utt_8_ch", "emotion": "happy", "intent": "Suggesting", "Subtitle": "走吧",
             "mode": "train"},
            {"video_id": "dia_1_utt_2_en", "emotion": "neutral", "intent": "neutral", "Subtitle": "Well.",
             "mode": "validation"},
            {"video_id": "dia_3_utt_0_ch", "emotion": "fear", "intent": "questioning", "Subtitle": "",
             "mode": "test"},
        ],
        expected=[
            {"uid": "mc-eiu/dia_622_utt_8_ch", "split": "train", "split_native": "train",
             "emotion": "happy",
             "intent": "suggesting", "parent": "dia_622_zh", "language": "zh",
             "subtitles": [said("走吧", "zh")]},
            {"uid": "mc-eiu/dia_1_utt_2_en", "split": "val", "split_native": "validation",
             "emotion": "neutral",
             "intent": "neutral", "parent": "dia_1_en", "language": "en",
             "subtitles": [said("Well.", "en")],
             "benchmarks": ["mc-eiu", "mc-eiu-i"]},
            {"uid": "mc-eiu/dia_3_utt_0_ch", "split": "test", "split_native": "test", "emotion": "fear",
             "intent": "questioning", "parent": "dia_3_zh", "language": "zh",
             "benchmarks": ["mc-eiu", "mc-eiu-i"]},
        ],
        stage2={"dia_622_utt_8_ch": {"gpt-4o-mini_intent": "He proposes to leave.",
                                     "gpt-4o-mini_Emotion": ""}},
        told2={"mc-eiu/dia_622_utt_8_ch": [merged("He proposes to leave.", "intent")]},
    ),
    Table(
        "mosi",
        "CMU-MOSI",
        rows=[
            {"video_id": "03bSnISJMiM_1", "sentiment_label": "negative", "text": "IT WAS BAD",
             "mode": "train"},
            {"video_id": "0h-zjBukYpk_2", "sentiment_label": "Positive", "text": "", "mode": "valid"},
            {"video_id": "_dI--eQ6qVU_3", "sentiment_label": "neutral", "text": "", "mode": "test"},
        ],
        expected=[
            {"uid": "mosi/03bSnISJMiM_1", "split": "train", "split_native": "train",
             "sentiment": "negative",
             "parent": "03bSnISJMiM", "subtitles": [said("IT WAS BAD")]},
            {"uid": "mosi/0h-zjBukYpk_2", "split": "val", "split_native": "valid", "sentiment": "positive",
             "parent": "0h-zjBukYpk"},
            {"uid": "mosi/_dI--eQ6qVU_3", "split": "test", "split_native": "test", "sentiment": "neutral",
             "parent": "_dI--eQ6qVU", "benchmarks": ["mosi"]},
        ],
    ),
    Table(
        "mosei",
        "CMU-MOSEI",
        rows=[
            {"video_id": "cM3Yna7AavY_1", "sentiment_label": "positive", "text": "I agree.",
             "mode": "train"},
            {"video_id": "0y022OlZ3W0_4", "sentiment_label": "negative", "text": "", "mode": "test"},
        ],
        expected=[
            {"uid": "mosei/cM3Yna7AavY_1", "split": "train", "split_native": "train",
             "sentiment": "positive",
             "parent": "cM3Yna7AavY", "subtitles": [said("I agree.")]},
            {"uid": "mosei/0y022OlZ3W0_4", "split": "test", "split_native": "test", "sentiment": "negative",
             "parent": "0y022OlZ3W0", "benchmarks": ["mosei"]},
        ],
        peaks={"cM3Yna7AavY_1": 30},
        stage2={"cM3Yna7AavY_1": {"gpt-4o-mini_Sentiment": "A nod."}},
        told2={"mosei/cM3Yna7AavY_1": [merged("A nod.", "sentiment")]},
    ),
    Table(
        "sims-v2",
        "CH-SIMS_v2_s",
        rows=[
            {"video_id": "video_0019_0002", "annotation": "Negative", "text": "不行", "mode": "train"},
            {"video_id": "aqgy3_0001_00000", "annotation": "Positive", "text": "好", "mode": "test"},
        ],
        expected=[
            {"uid": "sims-v2/video_0019_0002", "split": "train", "split_native": "train", "language": "zh",
             "sentiment": "negative", "parent": "video_0019", "subtitles": [said("不行", "zh")]},
            {"uid": "sims-v2/aqgy3_0001_00000", "split": "test", "split_native": "test", "language": "zh",
             "sentiment": "positive", "parent": "aqgy3_0001", "subtitles": [said("好", "zh")],
             "benchmarks": ["sims-v2"]},
        ],
    ),
    Table(
        "bold",
        "BOLD",
        rows=[
            {"video_id": "IzvOYVMltkI_0114_0", "Emotion_label": "Doubt/Confusion;Fear",
             "text_whisper": "Hm?",
             "mode": "train"},
            {"video_id": "IzvOYVMltkI_0115_0", "Emotion_label": "Disconnection",
             "text_whisper": "", "mode": "val"},
        ],
        expected=[
            {"uid": "bold/IzvOYVMltkI_0114_0", "split": "train", "split_native": "train",
             "emotion_multi": ["doubt/confusion", "fear"], "subtitles": [said("Hm?", "en", "asr:whisper")]},
            {"uid": "bold/IzvOYVMltkI_0115_0", "split": "val", "split_native": "val",
             "emotion_multi": ["disconnection"], "benchmarks": ["bold"]},
        ],
    ),
    Table(
        "sims",
        "SIMS",
        rows=[
            {"video_id": "video_0001_0004", "val_label": "positive", "english": "Fine.", "chinese": "好的"},
            {"video_id": "video_0060_0001", "val_label": "Negative", "english": "", "chinese": "不"},
        ],
        expected=[
            {"uid": "sims/video_0001_0004", "split": "test", "split_native": "test", "language": "zh",
             "sentiment": "positive", "parent": "video_0001", "benchmarks": ["sims"],
             "subtitles": [said("Fine.", "en", "translation"), said("好的", "zh")]},
            {"uid": "sims/video_0060_0001", "split": "test", "split_native": "test", "language": "zh",
             "sentiment": "negative", "parent": "video_0060", "benchmarks": ["sims"],
             "subtitles": [said("不", "zh")]},
        ],
        kinds=("label",),
    ),
    Table(
        "ov-merd",
        "OV-MERD+",
        rows=[
            {"video_id": "samplenew3_00000019", "sentence": "I am so glad!"},
            {"video_id": "sample_00000055", "sentence": ""},
        ],
        expected=[
            {"uid": "ov-merd/samplenew3_00000019", "split": "test", "split_native": "test",
             "language": "zh",
             "emotion_ov": ["joyful", "deeply relieved"], "benchmarks": ["ov-merd"],
             "subtitles": [said("I am so glad!", "en", "translation")]},
            {"uid": "ov-merd/sample_00000055", "split": "test", "split_native": "test", "language": "zh",
             "emotion_ov": ["serious"], "benchmarks": ["ov-merd"]},
        ],
        kinds=("label",),
        extra={"ovlabel.csv": 'name,openset\nsamplenew3_00000019,"[Joyful, deeply relieved]"\n'
                              "sample_00000055,['serious']\n"},
    ),
)  # fmt: skip
