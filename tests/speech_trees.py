"""Small copies of corpora of speech in their own layouts: dialogues, opinions, acted sentences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.mmeverse_trees import said
from tests.tree_files import Records, csd, data_of, put, table

# MER2023 and MER2024


def mer2023(folder: Path) -> Records:
    put(folder, "train-label.csv", "name,discrete,valence\nsample_00000001,worried,-1.5\n")
    put(folder, "test1-label.csv", "name,discrete,valence\nsample_00003364,happy,-10\n")
    put(folder, "test3-label.csv", "name,discrete\nsamplenew_00000002,angry\n")
    put(folder, "transcription-engchi-polish.csv",
        "name,chinese,english\nsample_00000001,现在怎么办,What now?\nsomebody_else,x,y\n")  # fmt: skip
    return [
        data_of("mer2023/sample_00000001", "train/sample_00000001.avi", "train", "train",
                split_axes={"MER2023_mode": "train"}, language="zh", emotion="worried", valence=-1.5,
                subtitles=[said("现在怎么办", "zh"), said("What now?", "en", "translation")]),
        data_of("mer2023/sample_00003364", "test1/sample_00003364.mp4", "test", "test1",
                split_axes={"MER2023_mode": "test1"}, language="zh", emotion="happy",
                benchmarks=["mer2023"]),
        data_of("mer2023/samplenew_00000002", "test3/samplenew_00000002.mp4", "test", "test3",
                split_axes={"MER2023_mode": "test3"}, language="zh", emotion="angry"),
    ]  # fmt: skip


def mer2024(folder: Path) -> Records:
    put(folder, "label-disdim.csv", "name,discrete,valence\nsample_00000001,worried,-1.5\n")
    put(folder, "semi-label.csv", "name,discrete\nsamplenew3_00037970,sad\n")
    put(folder, "label-transcription.csv", "name,chinese,english\nsamplenew3_00037970,走,Go.\n")
    return [
        data_of("mer2024/sample_00000001", "video-labeled/sample_00000001.mp4", "train", "train",
                split_axes={"MER2024_mode": "train"}, language="zh", emotion="worried", valence=-1.5),
        data_of("mer2024/samplenew3_00037970",
                "video-unlabeled-with-test2noise/samplenew3_00037970.mp4", "test", "test_semi",
                split_axes={"MER2024_mode": "test_semi"}, language="zh", emotion="sad",
                subtitles=[said("走", "zh"), said("Go.", "en", "translation")], benchmarks=["mer2024"]),
    ]  # fmt: skip


# MELD and EmoryNLP

_MELD = ("Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID",
         "Season", "Episode", "StartTime", "EndTime")  # fmt: skip


def meld(folder: Path) -> Records:
    time = ("8", "21", "0:16:16,059", "00:16:21,731")
    for split, row in {
        "train": ("1", "Oh, “no”, never.", "Chandler", "sadness", "negative", "0", "0", *time),
        "dev": ("1", "Yes!", "Phoebe", "joy", "positive", "0", "1", *time),
        "test": ("9", "Mark?", "All", "neutral", "neutral", "0", "0", *time),
    }.items():
        put(folder, f"{split}_sent_emo.csv", table([_MELD, row]))
    put(folder, "transcription-engchi-polish.csv",
        table([("name", "chinese", "english"), ("val_dia0_utt1", "是的", "Yes!")]))  # fmt: skip
    return [
        data_of("meld/train_dia0_utt0", "train_splits/dia0_utt0.mp4", "train", "train",
                parent="train_dia0", speaker="Chandler", emotion="sad", sentiment="negative",
                subtitles=[said("Oh, “no”, never.")]),
        data_of("meld/dev_dia0_utt1", "dev/dev_splits_complete/dia0_utt1.mp4", "val", "dev",
                parent="dev_dia0", speaker="Phoebe", emotion="joy", sentiment="positive",
                subtitles=[said("Yes!"), said("是的", "zh", "translation")], benchmarks=["meld-s"]),
        data_of("meld/test_dia0_utt0", "output_repeated_splits_test/dia0_utt0.mp4", "test", "test",
                parent="test_dia0", speaker="All", emotion="neutral", sentiment="neutral",
                subtitles=[said("Mark?")], benchmarks=["meld-e", "meld-s"]),
    ]  # fmt: skip


def meld_dyadic(folder: Path) -> Records:
    header = (*_MELD[1:7], "Old_Dialogue_ID", "Old_Utterance_ID", *_MELD[7:])
    time = ("8", "21", "0:16:16,059", "00:16:21,731")
    for split, (dialogue, old) in {
        "train": ("7", "5"),
        "dev": ("0", "0"),
        "test": ("1", "1"),
    }.items():
        row = ("Hi.", "Ross", "joy", "positive", dialogue, "0", old, "3", *time)
        put(folder, f"{split}_sent_emo_dya.csv", table([header, row]))
    both = {
        "speaker": "Ross",
        "emotion": "joy",
        "sentiment": "positive",
        "subtitles": [said("Hi.")],
    }
    return [
        data_of("meld-dyadic/train_dya7_utt0", "train_dia5_utt3.mp4", "train", "train",
                parent="train_dia5", **both),
        data_of("meld-dyadic/dev_dya0_utt0", "dev_dia0_utt3.mp4", "val", "dev",
                parent="dev_dia0", **both),
        data_of("meld-dyadic/test_dya1_utt0", "test_dia1_utt3.mp4", "test", "test",
                parent="test_dia1", **both),
    ]  # fmt: skip


def emorynlp(folder: Path) -> Records:
    header = ("Utterance", "Speaker", "Emotion", "Scene_ID", "Utterance_ID", "Season", "Episode",
              "Start_Time", "End_Time")  # fmt: skip
    time = ("00:00:02.877", "00:00:07.548")
    rows = {
        "train": (
            "Kissing, is it?",
            "['Monica Geller', 'Phoebe Buffay']",
            "Joyful",
            "1",
            "12",
            "1",
            "2",
        ),
        "dev": ("What?", '["Phoebe\'s Assistant"]', "Mad", "3", "1", "1", "15"),
        "test": ("I see.", "['Ross Geller']", "Neutral", "4", "1", "1", "1"),
    }
    for split, row in rows.items():
        put(folder, f"emorynlp_{split}_final.csv", table([header, (*row, *time)]))
    return [
        data_of("emorynlp/s01_e02_c01_u012", "s01_e02_c01_u012.mp4", "train", "train",
                parent="s01_e02_c01", speaker="Monica Geller;Phoebe Buffay", emotion="joyful",
                subtitles=[said("Kissing, is it?")]),
        data_of("emorynlp/s01_e15_c03_u001", "s01_e15_c03_u001.mp4", "val", "dev",
                parent="s01_e15_c03", speaker="Phoebe's Assistant", emotion="mad",
                subtitles=[said("What?")]),
        data_of("emorynlp/s01_e01_c04_u001", "s01_e01_c04_u001.mp4", "test", "test",
                parent="s01_e01_c04", speaker="Ross Geller", emotion="neutral",
                subtitles=[said("I see.")]),
    ]  # fmt: skip


def emorynlp_json(folder: Path) -> Records:
    def season(code: str, emotion: str, speakers: list[str]) -> str:
        utterance = {"utterance_id": f"{code}_u001", "speakers": speakers, "transcript": "Coffee.",
                     "tokens": [["Coffee", "."]], "emotion": emotion}  # fmt: skip
        scene = {"scene_id": code, "utterances": [utterance]}
        episode = {"episode_id": code[:7], "scenes": [scene]}
        return json.dumps({"season_id": code[:3], "episodes": [episode]})

    put(folder, "emotion-detection-dev.json", season("s01_e15_c01", "Scared", ["A B", "C"]))
    put(folder, "emotion-detection-tst.json", season("s01_e01_c04", "Powerful", ["D"]))
    return [
        data_of("emorynlp/s01_e15_c01_u001", "s01_e15_c01_u001.mp4", "val", "dev",
                parent="s01_e15_c01", speaker="A B;C", emotion="scared", subtitles=[said("Coffee.")]),
        data_of("emorynlp/s01_e01_c04_u001", "s01_e01_c04_u001.mp4", "test", "tst",
                parent="s01_e01_c04", speaker="D", emotion="powerful", subtitles=[said("Coffee.")]),
    ]  # fmt: skip


# IEMOCAP

_EVALUATION = """\
% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes01F_impro01_M001\txxx\t[3.0000, 3.0000, 5.5000]
C-F1:\tNeutral; Excited;\t()
"""


def iemocap(folder: Path) -> Records:
    put(folder, "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", _EVALUATION)
    put(folder, "Session1/dialog/EmoEvaluation/._Ses01F_impro01.txt", b"\0\5\26\7 a Mac's leavings")
    put(
        folder,
        "Session1/dialog/EmoEvaluation/Categorical/Ses01F_impro01_e2_cat.txt",
        "not this one",
    )
    put(folder, "Session1/dialog/transcriptions/Ses01F_impro01.txt",
        "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.\nM: [LAUGHTER]\n"
        "Ses01F_impro01_M001 [010.0100-011.3925]: Do you have your forms?\n")  # fmt: skip
    put(folder, "Session5/dialog/EmoEvaluation/Ses05M_script01_1b.txt",
        "[0.5000 - 1.0000]\tSes05M_script01_1b_MXX0\texc\t[4.0000, 4.0000, 0.5000]\n"
        "[1.5000 - 2.0000]\tSes05M_script01_1b_F000\tfru\t[2.0000, 4.0000, 3.0000]\n")  # fmt: skip
    put(folder, "Session5/dialog/transcriptions/Ses05M_script01_1b.txt",
        b"Ses05M_script01_1b_MXX0 [000.5000-001.0000]: That\x92s great.\n")  # fmt: skip
    return [
        data_of("iemocap/Ses01F_impro01_F000",
                "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav", "train", None,
                split_axes={"session": "1", "speaker": "Ses01_F"}, parent="Ses01F_impro01",
                speaker="Ses01_F", emotion="neutral", valence=2.5, arousal=2.5, dominance=2.5,
                subtitles=[said("Excuse me.")]),
        data_of("iemocap/Ses01F_impro01_M001", "subvideo-tgt/Ses01F_impro01_M001.avi", "train", None,
                split_axes={"session": "1", "speaker": "Ses01_M"}, parent="Ses01F_impro01",
                speaker="Ses01_M", valence=3.0, arousal=3.0, dominance=5.5,
                subtitles=[said("Do you have your forms?")]),
        data_of("iemocap/Ses05M_script01_1b_MXX0", "video/Ses05M_script01_1b_MXX0.mp4", "test", None,
                split_axes={"session": "5", "speaker": "Ses05_M"}, parent="Ses05M_script01_1b",
                speaker="Ses05_M", emotion="excited", valence=4.0, arousal=4.0, dominance=0.5,
                subtitles=[said("That\u2019s great.")], benchmarks=["iemocap"]),
        data_of("iemocap/Ses05M_script01_1b_F000", "video/Ses05M_script01_1b_F000.mp4", "test", None,
                split_axes={"session": "5", "speaker": "Ses05_F"}, parent="Ses05M_script01_1b",
                speaker="Ses05_F", emotion="frustration", valence=2.0, arousal=4.0, dominance=3.0),
    ]  # fmt: skip


# Sentiment

_FOLDS = '''"""Standard folds."""
standard_train_fold={}
standard_valid_fold={}
standard_test_fold={}
import os  # never run
'''


def mosi(folder: Path) -> Records:
    csd(folder / "CSD/CMU_MOSI_Opinion_Labels.csd", "Opinion Segment Labels", {
        "03bSnISJMiM": (np.float32([[2.4], [-0.6]]), [[0.0, 2.0], [2.0, 4.5]]),
        "0h-zjBukYpk": (np.float32([[0.0]]), [[1.0, 2.0]]),
        "_dI--eQ6qVU": (np.float32([[-3.0]]), [[1.0, 2.0]]),
    })  # fmt: skip
    csd(folder / "CSD/CMU_MOSI_TimestampedWords.csd", "words", {
        "03bSnISJMiM": (np.array([[b"sp"], [b"anyhow"], [b"good"], [b"but"]], "S32"),
                        [[0.0, 0.2], [0.2, 1.0], [1.0, 1.9], [1.9, 2.3]]),
        "0h-zjBukYpk": (np.array([[b"well"]], "S32"), [[1.2, 1.4]]),
    })  # fmt: skip
    put(folder, "SDK/cmu_mosi_std_folds.py",
        _FOLDS.format(["03bSnISJMiM"], ["0h-zjBukYpk"], ["_dI--eQ6qVU", "elsewhere"]))  # fmt: skip
    put(folder, "Raw/Transcript/Segmented/0h-zjBukYpk.annotprocessed", "1_DELIM_WELL, WELL.\n")
    where = "Raw/Video/Segmented"
    return [
        data_of("mosi/03bSnISJMiM_1", f"{where}/03bSnISJMiM_1.mp4", "train", "train",
                parent="03bSnISJMiM", sentiment="positive", sentiment_score=2.4,
                subtitles=[said("anyhow good")]),
        data_of("mosi/03bSnISJMiM_2", f"{where}/03bSnISJMiM_2.mp4", "train", "train",
                parent="03bSnISJMiM", sentiment="negative", sentiment_score=-0.6,
                subtitles=[said("but")]),
        data_of("mosi/0h-zjBukYpk_1", f"{where}/0h-zjBukYpk_1.mp4", "val", "valid",
                parent="0h-zjBukYpk", sentiment="neutral", sentiment_score=0.0,
                subtitles=[said("WELL, WELL.")]),
        data_of("mosi/_dI--eQ6qVU_1", f"{where}/_dI--eQ6qVU_1.mp4", "test", "test",
                parent="_dI--eQ6qVU", sentiment="negative", sentiment_score=-3.0, benchmarks=["mosi"]),
    ]  # fmt: skip


def mosei(folder: Path) -> Records:
    csd(folder / "CMU_MOSEI_Labels.csd", "All Labels", {
        "cM3Yna7AavY": (np.float32([[1.0, 2 / 3, 0, 0, 0, 0, 1 / 3], [0, 0, 0, 0, 0, 0, 0]]),
                        [[0.0, 6.5], [8.125, 9.0]]),
        "0y022OlZ3W0": (np.float32([[-1 / 3, 0, 1, 0, 0, 2, 0]]), [[3.0, 4.0]]),
    })  # fmt: skip
    put(folder, "cmu_mosei_std_folds.py", _FOLDS.format(["cM3Yna7AavY"], [], ["0y022OlZ3W0"]))
    transcript = "Raw/Transcript/Segmented/Combined"
    put(folder, f"{transcript}/cM3Yna7AavY.txt",
        "cM3Yna7AavY___0___7.0___8.0___Not labelled.\ncM3Yna7AavY___1___0.0___6.5___I agree.\n")  # fmt: skip
    put(folder, f"{transcript}/0y022OlZ3W0.txt", "0y022OlZ3W0___4___3.0___4.0___No ___ way.\n")
    where = "Raw/Videos/Segmented/Combined"
    return [
        data_of("mosei/cM3Yna7AavY_1", f"{where}/cM3Yna7AavY_1.mp4", "train", "train",
                parent="cM3Yna7AavY", sentiment="positive", sentiment_score=1.0,
                emotion_multi=["happy", "fear"], subtitles=[said("I agree.")]),
        # No line of the transcript begins there, so nobody knows the clip's number.
        data_of("mosei/cM3Yna7AavY[1]", f"{where}/cM3Yna7AavY[1].mp4", "train", "train",
                parent="cM3Yna7AavY", sentiment="neutral", sentiment_score=0.0),
        data_of("mosei/0y022OlZ3W0_4", f"{where}/0y022OlZ3W0_4.mp4", "test", "test",
                parent="0y022OlZ3W0", sentiment="negative", sentiment_score=-0.333333,
                emotion_multi=["sad", "disgust"], subtitles=[said("No ___ way.")],
                benchmarks=["mosei"]),
    ]  # fmt: skip


_MMSA = (
    "video_id",
    "clip_id",
    "text",
    "label",
    "label_T",
    "label_A",
    "label_V",
    "annotation",
    "mode",
)


def mmsa(folder: Path, corpus: str) -> Records:
    put(folder, "label.csv", table([
        _MMSA,
        ("-3g5yACwYnA", "13", "I SEE, SO", "1.0", "", "", "", "Positive", "train"),
        ("-3g5yACwYnA", "2", "NO", "-2.3333333", "", "", "", "Negative", "valid"),
        ("03bSnISJMiM", "11", "HM", "0.0", "", "", "", "Neutral", "test"),
    ]))  # fmt: skip
    return [
        data_of(f"{corpus}/-3g5yACwYnA_13", "Raw/-3g5yACwYnA/13.mp4", "train", "train",
                parent="-3g5yACwYnA", sentiment="positive", sentiment_score=1.0,
                subtitles=[said("I SEE, SO")]),
        data_of(f"{corpus}/-3g5yACwYnA_2", "Raw/-3g5yACwYnA/2.mp4", "val", "valid",
                parent="-3g5yACwYnA", sentiment="negative", sentiment_score=-2.3333333,
                subtitles=[said("NO")]),
        data_of(f"{corpus}/03bSnISJMiM_11", "Raw/03bSnISJMiM/11.mp4", "test", "test",
                parent="03bSnISJMiM", sentiment="neutral", sentiment_score=0.0,
                subtitles=[said("HM")], benchmarks=[corpus]),
    ]  # fmt: skip


def sims(folder: Path, corpus: str, name: str) -> Records:
    put(folder, name, table([
        _MMSA,
        ("video_0001", "1", "我不想嫁给李茶", "-0.8", "-1", "-0.6", "-0.8", "Negative", "train"),
        ("video_0001", "0004", "可以 好", "0.4", "0", "0", "0", "Positive", "valid"),
        ("aqgy3_0001", "00012", "嗯", "0.0", "0", "0", "0", "Neutral", "test"),
    ]))  # fmt: skip
    put(folder, "transcription-engchi-polish.csv",
        table([("name", "chinese", "english"), ("video_0001_0001", "x", "I will not.")]))  # fmt: skip
    return [
        data_of(f"{corpus}/video_0001_0001", "Raw/video_0001/0001.mp4", "train", "train",
                parent="video_0001", language="zh", sentiment="negative", sentiment_score=-0.8,
                subtitles=[said("我不想嫁给李茶", "zh"), said("I will not.", "en", "translation")]),
        data_of(f"{corpus}/video_0001_0004", "Raw/video_0001/0004.mp4", "val", "valid",
                parent="video_0001", language="zh", sentiment="positive", sentiment_score=0.4,
                subtitles=[said("可以 好", "zh")]),
        data_of(f"{corpus}/aqgy3_0001_00012", "Raw/aqgy3_0001/00012.mp4", "test", "test",
                parent="aqgy3_0001", language="zh", sentiment="neutral", sentiment_score=0.0,
                subtitles=[said("嗯", "zh")], benchmarks=[corpus]),
    ]  # fmt: skip


# Acted


def crema_d(folder: Path, perceived: bool) -> Records:
    put(folder, "SentenceFilenames.csv",
        '"Stimulus_Number","Filename"\n1,"1001_IEO_NEU_XX"\n2,"1091_WSI_HAP_HI"\n')  # fmt: skip
    put(folder, "processedResults/summaryTable.csv", table([
        ("", "FileName", "VoiceVote", "VoiceLevel", "FaceVote", "FaceLevel", "MultiModalVote",
         "MultiModalLevel"),
        ("1", "1001_IEO_NEU_XX", "N", "69.1", "N", "92.22", "N:S", "64.78"),
        ("2", "1091_WSI_HAP_HI", "N", "71.67", "H", "57", "N", "57.38"),
    ]))  # fmt: skip
    return [
        data_of("crema-d/1001_IEO_NEU_XX", "VideoFlash/1001_IEO_NEU_XX.flv", None, None,
                split_axes={"actor": "1001", "level": "XX", "sentence": "IEO"}, speaker="1001",
                emotion=None if perceived else "neutral", emotion_multi=["neutral", "sad"],
                subtitles=[said("It's eleven o'clock.")]),
        data_of("crema-d/1091_WSI_HAP_HI", "AudioWAV/1091_WSI_HAP_HI.wav", None, None,
                split_axes={"actor": "1091", "level": "HI", "sentence": "WSI"}, speaker="1091",
                emotion="neutral" if perceived else "happy", emotion_multi=["neutral"],
                subtitles=[said("We'll stop in a couple of minutes.")]),
    ]  # fmt: skip


def emodb(folder: Path) -> Records:
    return [
        data_of("emodb/03a01Wa", "wav/03a01Wa.wav", None, None, speaker="03", emotion="anger",
                split_axes={"speaker": "03", "sentence": "a01"},
                subtitles=[said("Der Lappen liegt auf dem Eisschrank.", "de")]),
        data_of("emodb/16b10Lb", "wav/16b10Lb.wav", None, None, speaker="16", emotion="boredom",
                split_axes={"speaker": "16", "sentence": "b10"},
                subtitles=[said("Die wird auf dem Platz sein, wo wir sie immer hinlegen.", "de")]),
    ]  # fmt: skip


def emobox(folder: Path, fold_1: bool) -> Records:
    def lines(*found: tuple[str, str]) -> str:
        return "".join(
            json.dumps({"key": f"emodb-{code}", "wav": f"downloads/emodb/wav/{code}.wav", "emo": emo,
                        "length": 1.9, "channel": 1}) + "\n"
            for code, emo in found
        )  # fmt: skip

    anger, boredom = ("03a01Wa", "anger"), ("16b10Lb", "boredem")
    if not fold_1:
        put(folder, "emodb.jsonl", lines(anger, boredom))
    put(folder, "emodb_train_fold_1.jsonl", lines(anger))
    put(folder, "emodb_test_fold_1.jsonl", lines(boredom))
    records = emodb(folder)
    records[1]["split_axes"]["fold"] = "1"
    if fold_1:
        records[0]["split_axes"]["fold"] = "1"
        for record, split in zip(records, ("train", "test"), strict=True):
            record.update(split=split, split_native=split)
    return records
