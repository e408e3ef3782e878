"""Small copies of corpora of faces, bodies and descriptions in their own layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from extract.corpora.readers.faces import BOLD_CATEGORIES
from tests.mmeverse_trees import merged, said, tone
from tests.tree_files import Records, data_of, put, table

# Faces


def caer(folder: Path) -> Records:
    # The names start anew in every folder: ids need split and emotion to be different.
    return [
        data_of("caer/train_Anger_0001", "train/Anger/0001.avi", "train", "train", emotion="anger"),
        data_of("caer/validation_Anger_0001", "validation/Anger/0001.avi", "val", "validation",
                emotion="anger", benchmarks=["caer"]),
        data_of("caer/test_Sad_0001", "test/Sad/0001.avi", "test", "test", emotion="sad",
                benchmarks=["caer"]),
    ]  # fmt: skip


def e3(folder: Path) -> Records:
    def entry(video_id: str, emotion: str, **rest: str) -> str:
        return json.dumps([{"video_id": video_id, "emotion": emotion, **rest}])

    put(folder, "annotations/train.json",
        entry("x-6CtPWVi6E_0208_1", "sarcastic", conversation="Great.", sentiment="negative",
              person="The man in black", description="He mocks."))  # fmt: skip
    put(folder, "annotations/val.json", entry("ab_cd_0001_2", "Scared"))
    put(folder, "annotations/test.json", entry("zz_0002_1", "shy"))
    return [
        data_of("e3/x-6CtPWVi6E_0208_1", "video/x-6CtPWVi6E_0208_1.mp4", "train", "train",
                emotion="sarcastic", sentiment="negative", parent="x-6CtPWVi6E",
                person="The man in black", subtitles=[said("Great.", None)],
                descriptions=[{"kind": "multimodal", "text": "He mocks.", "target": "emotion"}]),
        data_of("e3/ab_cd_0001_2", "video/ab_cd_0001_2.mp4", "val", "val", emotion="scared",
                parent="ab_cd", benchmarks=["e3"]),
        data_of("e3/zz_0002_1", "video/zz_0002_1.mp4", "test", "test", emotion="shy", parent="zz",
                benchmarks=["e3"]),
    ]  # fmt: skip


def dfew(folder: Path, train: str, test: str) -> Records:
    put(folder, train.format(1), "video_name,label\n77,1\n00078,4\n")
    put(folder, test.format(1), "video_name,label\n16372,7\n")
    # The other sets test what set 1 trains on.
    put(folder, train.format(2), "video_name,label\n16372,7\n77,1\n")
    put(folder, test.format(2), "video_name,label\n78,4\n")
    return [
        data_of("dfew/77", "Clip/original/part_1/77.mp4", "train", "train", emotion="happy"),
        data_of("dfew/78", "Clip/original/part_1/78.mp4", "train", "train", emotion="angry",
                split_axes={"fold": "2"}),
        data_of("dfew/16372", "Clip/original/part_9/16372.mp4", "test", "test", emotion="fear",
                split_axes={"fold": "1"}, benchmarks=["dfew"]),
    ]  # fmt: skip


def mafw(folder: Path) -> Records:
    single = "Train & Test Set/single/no_caption"
    put(folder, f"{single}/set_1/train.txt", "00022.mp4 anger\n00023.mp4 neutral\n")
    put(folder, f"{single}/set_1/test.txt", "20045.mp4 anger\n00050.mp4 helplessness\n")
    put(folder, f"{single}/set_2/train.txt", "20045.mp4 anger\n")
    put(folder, f"{single}/set_2/test.txt", "00022.mp4 anger\n")
    compound = "Train & Test Set/compound/no_caption/set_1"
    put(folder, f"{compound}/train.txt", "00022.mp4 anger_disgust\n00023.mp4 neutral\n")
    put(folder, f"{compound}/test.txt", "20045.mp4 anger_disgust_anxiety\n00050.mp4 helplessness\n")
    captions = "20045.mp4\tanger\t<br>一个女人皱眉。\t<br>A woman frowns."
    put(folder, "Train & Test Set/single/with_caption/set_1/test.txt", captions.encode("gb18030"))
    return [
        data_of("mafw/00022", "data/clips/00022.mp4", "train", "train", split_axes={"fold": "2"},
                emotion="anger", emotion_multi=["anger", "disgust"]),
        data_of("mafw/00023", "data/clips/00023.mp4", "train", "train", emotion="neutral"),
        data_of("mafw/20045", "data/clips/20045.mp4", "test", "test", split_axes={"fold": "1"},
                emotion="anger", emotion_multi=["anger", "disgust", "anxiety"],
                descriptions=[{"kind": "visual_expression", "text": "A woman frowns."}],
                benchmarks=["mafw", "mafw-m"]),
        data_of("mafw/00050", "data/clips/00050.mp4", "test", "test", split_axes={"fold": "1"},
                emotion="helplessness", benchmarks=["mafw"]),
    ]  # fmt: skip


def bold(folder: Path) -> Records:
    def line(video: str, person: str, rates: Mapping[str, str]) -> str:
        cells = [video, person, "0", "99", *(rates.get(c, "0.1") for c in BOLD_CATEGORIES)]
        return ",".join([*cells, "0.4", "0.75", "0.6", "Male", "Adult", "White", "0.9"])

    clip = "003/IzvOYVMltkI.mp4/0114.mp4"
    put(folder, "annotations/train.csv",
        line(clip, "0", {"Doubt/Confusion": "0.5", "Fear": "0.93", "Anger": "0.49"}) + "\n"
        + line(clip, "1.0", {}) + "\n")  # fmt: skip
    put(
        folder, "annotations/val.csv", line("004/abc.mp4/0001.mp4", "0", {"Disconnect": "1"}) + "\n"
    )
    vad = {"valence": 0.4, "arousal": 0.75, "dominance": 0.6}
    return [
        data_of("bold/003/IzvOYVMltkI/0114_p0", f"videos/{clip}", "train", "train",
                parent="003/IzvOYVMltkI", emotion_multi=["doubt/confusion", "fear"], **vad),
        data_of("bold/003/IzvOYVMltkI/0114_p1", f"videos/{clip}", "train", "train",
                parent="003/IzvOYVMltkI", **vad),
        data_of("bold/004/abc/0001_p0", "videos/004/abc.mp4/0001.mp4", "val", "val",
                parent="004/abc", emotion_multi=["disconnection"], benchmarks=["bold"], **vad),
    ]  # fmt: skip


def mc_eiu(folder: Path) -> Records:
    header = ("Name", "Speaker", "Subtitle", "Emotion", "Intent")
    for split, row in {
        "train": ("dia_622_utt_8_ch", "A", "走吧", "Happy", "Suggesting"),
        "val": ("dia_1_utt_2_en", "B", "Well.", "Neutral", "Neutral"),
        "test": ("dia_3_utt_0_en", "A", "Who?", "Surprise", "Questioning"),
    }.items():
        put(folder, f"{split}.csv", table([header, row]))
    both = ["mc-eiu", "mc-eiu-i"]
    return [
        data_of("mc-eiu/dia_622_utt_8_ch", "clips/dia_622_utt_8_ch.mkv", "train", "train",
                parent="dia_622_zh", speaker="A", language="zh", emotion="happy", intent="suggesting",
                subtitles=[said("走吧", "zh")]),
        data_of("mc-eiu/dia_1_utt_2_en", "clips/dia_1_utt_2_en.mkv", "val", "validation",
                parent="dia_1_en", speaker="B", language="en", emotion="neutral", intent="neutral",
                subtitles=[said("Well.")], benchmarks=both),
        data_of("mc-eiu/dia_3_utt_0_en", "clips/dia_3_utt_0_en.mkv", "test", "test",
                parent="dia_3_en", speaker="A", language="en", emotion="surprise",
                intent="questioning", subtitles=[said("Who?")], benchmarks=both),
    ]  # fmt: skip


# Descriptions and open vocabulary


def ov_merd(folder: Path) -> Records:
    put(folder, "ovlabel.csv",
        'name,openset\nsamplenew3_00000019,"[Joyful, deeply relieved]"\nsample_00000055,[]\n')  # fmt: skip
    put(folder, "subtitle_eng.csv", "name,sentence\nsamplenew3_00000019,I am so glad!\n")
    return [
        data_of("ov-merd/samplenew3_00000019", "video/samplenew3_00000019.mp4", "test", "test",
                language="zh", emotion_ov=["joyful", "deeply relieved"],
                subtitles=[said("I am so glad!", "en", "translation")], benchmarks=["ov-merd"]),
        data_of("ov-merd/sample_00000055", "video/sample_00000055.mp4", "test", "test", language="zh"),
    ]  # fmt: skip


def mer_caption_plus(folder: Path) -> Records:
    put(folder, "track2_train_mercaptionplus.csv",
        "name,openset\nsamplenew3_00000001,\"['happy', 'at ease']\"\n"
        'samplenew3_00000002,"worried, tense"\n')  # fmt: skip
    put(folder, "track3_train_mercaptionplus.csv",
        'name,reason\nsamplenew3_00000001,"She smiles, and sings."\n')  # fmt: skip
    put(folder, "subtitle_chieng.csv", "name,chinese,english\nsamplenew3_00000001,啦啦,La la.\n")
    return [
        data_of("mer-caption-plus/samplenew3_00000001", "video/samplenew3_00000001.mp4", "train",
                "train", language="zh", emotion_ov=["happy", "at ease"],
                subtitles=[said("啦啦", "zh"), said("La la.", "en", "translation")],
                descriptions=[{"kind": "multimodal", "text": "She smiles, and sings.",
                               "target": "emotion_ov"}]),
        data_of("mer-caption-plus/samplenew3_00000002", "video/samplenew3_00000002.mp4", "train",
                "train", language="zh", emotion_ov=["worried", "tense"]),
    ]  # fmt: skip


def emer(folder: Path) -> Records:
    put(folder, "final-EMER-reason.csv",
        "name,chinese,english\n"
        'sample_00000000,在视频中他笑。,"In the video, he says: ""no""."\n')  # fmt: skip
    return [
        data_of("emer/sample_00000000", "sample_00000000.mp4", "test", "test", language="zh",
                descriptions=[
                    {"kind": "multimodal", "text": 'In the video, he says: "no".', "version": "v2-en"},
                    {"kind": "multimodal", "text": "在视频中他笑。", "version": "v2-zh"},
                ]),
    ]  # fmt: skip


def emer_v1(folder: Path) -> Records:
    put(folder, "gt-eng.csv",
        'names,emotions,subtitles,reasons\nsample_00000648,angry,"No, never.",He roars.\n'
        "sample_00004422,happy,,She smiles.\n")  # fmt: skip
    put(folder, "gt-chi.csv", "names,emotions,subtitles,reasons\nsample_00000648,angry,不,他吼。\n")
    return [
        data_of("emer/sample_00000648", "sample_00000648.mp4", "test", "test", language="zh",
                emotion="angry",
                subtitles=[said("No, never.", "en", "translation"), said("不", "zh")],
                descriptions=[{"kind": "multimodal", "text": "He roars.", "version": "v1-en"},
                              {"kind": "multimodal", "text": "他吼。", "version": "v1-zh"}]),
        data_of("emer/sample_00004422", "sample_00004422.mp4", "test", "test", language="zh",
                emotion="happy",
                descriptions=[{"kind": "multimodal", "text": "She smiles.", "version": "v1-en"}]),
    ]  # fmt: skip


def merr(folder: Path, corpus: str) -> Records:
    common = {"AU_list": ["AU06", "AU12"], "visual_prior_list": ["Cheek raiser", "Lip corner puller"],
              "audio_prior_list": "A warm voice.", "peak_index": "57", "peak_AU_list": ["AU12"],
              "text": "谢谢", "pseu_emotion": "happy", "caption": "A template."}  # fmt: skip
    clues = [{"kind": "visual_expression", "text": "Cheek raiser; Lip corner puller"},
             tone("A warm voice.", "Qwen-Audio")]  # fmt: skip
    if corpus == "merr-coarse":
        entries = {"sample_00000047": common}
        told = [{"kind": "multimodal", "text": "A template.", "target": "emotion"}]
    else:
        entries = {"sample_00000047": common | {"smp_reason_caption": "She is glad."}}
        told = [
            {**merged("She is glad.", "emotion"), "model": "LLaMA-3-8B", "version": "fine"},
            {"kind": "multimodal", "text": "A template.", "target": "emotion", "version": "coarse"},
        ]
    put(folder, f"MERR_{corpus.removeprefix('merr-')}_grained.json", json.dumps(entries))
    return [
        data_of(f"{corpus}/sample_00000047", "sample_00000047.avi", "train", "train", language="zh",
                emotion="happy", peak={"index": 57}, subtitles=[said("谢谢", None)],
                descriptions=[*told, *clues]),
    ]  # fmt: skip
