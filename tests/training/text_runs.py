"""Runs of language models small enough for tests, on a made-up text whose next word can be guessed."""

import random
from pathlib import Path
from typing import Any

from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, TextConfig

WORDS, STREAMS, WINDOW = 12, 4, 5
"""Words besides <eos> and <unk>; and the batches of `text_config`."""


def write_text(folder: Path, *, lines: int = 120, seed: int = 0, words: int = WORDS) -> Path:
    """train.txt, valid.txt and test.txt: each word is followed by one of three."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for split, share in (("train", 1.0), ("valid", 0.3), ("test", 0.4)):
        text = []
        for _ in range(int(share * lines)):
            word, line = draw.randrange(words), []
            for _ in range(draw.randint(3, 8)):
                line.append(chr(ord("a") + word) * (1 + word % 4))
                word = (3 * word + draw.choice((1, 1, 1, 2, 5))) % words
            text.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    return folder


def text_config(folder: Path, objective: str = "ban+l", **changes: Any) -> Config:
    """Three epochs of some forty windows for a teacher and two students, with dropout, clipping and a plateau."""
    values: dict[str, Any] = {
        "data": DataConfig(name=str(folder)),
        "text": TextConfig(window=WINDOW),
        "model": ModelConfig(name="lstm-8", options={"dropout": 0.2}),
        "objective": ObjectiveConfig(name=objective),
        "optimizer": OptimizerConfig(
            lr=1.0,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            schedule="plateau",
            lr_decay=0.25,
            clip_norm=2.0,
        ),
        "generations": 2,
        "epochs": 3,
        "batch_size": STREAMS,
        "device": "cpu",
    }
    return Config(**{**values, **changes})
