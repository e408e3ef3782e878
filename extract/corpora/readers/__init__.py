"""Readers of formats that one corpus, or a family of them, has for itself.

Each is called with a file, the dataset's folder and the options of the row's source, and yields rows of
text like the generic ones of `extract.corpora.tables`. Nothing that a file holds is ever executed or
unpickled.
"""

from __future__ import annotations

from extract.corpora.readers.acted import read_crema_d, read_crema_d_votes, read_emobox, read_emodb
from extract.corpora.readers.cells import read_cells
from extract.corpora.readers.cmu import read_folds, read_opinions, read_segments, read_transcript
from extract.corpora.readers.faces import read_bold, read_dfew, read_mafw
from extract.corpora.readers.iemocap import read_evaluation, read_transcription
from extract.corpora.readers.npz import read_npz
from extract.corpora.reading import Reader

READERS: dict[str, Reader] = {
    "iemocap-evaluation": read_evaluation,
    "iemocap-transcription": read_transcription,
    "csd-segments": read_segments,
    "mmsdk-folds": read_folds,
    "mosei-transcript": read_transcript,
    "mosi-transcript": read_opinions,
    "dfew": read_dfew,
    "mafw": read_mafw,
    "bold": read_bold,
    "cells": read_cells,
    "emodb": read_emodb,
    "emobox": read_emobox,
    "crema-d": read_crema_d,
    "crema-d-votes": read_crema_d_votes,
    "npz": read_npz,
}
"""Reader by name, as a source of a row names it."""
