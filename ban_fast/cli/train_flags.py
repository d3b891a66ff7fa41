"""The flags of `ban-fast train`, which are those of `ban-fast sweep` too."""

from typing import Annotated

import typer

from ..config import (
    AMP_MODES,
    CACHE_DTYPES,
    CACHE_FILLS,
    DEVICES,
    FOLDS,
    LEVELS,
    LOADERS,
    OBJECTIVES,
    OVER_TIME,
    SCHEDULES,
    STEPS,
    TEACHERS,
)
from .declare import flag, real, switch, whole

_RUN, _IMAGES, _TEXTS = "Run", "Images", "Texts"
_NETWORKS, _TRAINING, _MACHINE = "Networks and teaching", "Training", "Machine"


def train(
    ctx: typer.Context,
    recipe: Annotated[
        str | None,
        flag(
            "--recipe",
            "R",
            "Settings to begin with: demo, cifar10, cifar100, paper, ptb-lstm, ptb-cnn-lstm, ptb-small. Default: by "
            "--data.",
            _RUN,
        ),
    ] = None,
    config: Annotated[
        str | None, flag("--config", "FILE", "Begin with a run's config.json instead: repeats that run.", _RUN)
    ] = None,
    out: Annotated[
        str | None, flag("--out", "DIR", "Directory to write the run to. Default: runs/RECIPE-DATE-TIME.", _RUN)
    ] = None,
    resume: Annotated[
        bool, switch("--resume", "Continue the run in --out where it was stopped, to the same bits.", _RUN)
    ] = False,
    seed: Annotated[
        int | None, flag("--seed", "N", "Every random draw of the run derives from it.", _RUN, whole)
    ] = None,
    data: Annotated[
        str | None,
        flag(
            "--data",
            "NAME|DIR",
            "digits, cifar10, cifar100, or a folder of train/CLASS/* and test/CLASS/*; ptb, or a folder with "
            "train.txt, valid.txt and test.txt.",
            _RUN,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        flag(
            "--data-dir",
            "DIR",
            "The dataset's directory, or its parent. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast.",
            _RUN,
        ),
    ] = None,
    image_size: Annotated[
        int | None, flag("--image-size", "S", "Side in pixels that a folder's images are resized to.", _IMAGES, whole)
    ] = None,
    val_fraction: Annotated[
        float | None,
        flag("--val-fraction", "F", "Share of the training images held out to validate on.", _IMAGES, real),
    ] = None,
    limit_train: Annotated[
        int | None, flag("--limit-train", "N", "Use only N training images.", _IMAGES, whole)
    ] = None,
    limit_test: Annotated[int | None, flag("--limit-test", "N", "Use only N test images.", _IMAGES, whole)] = None,
    loader: Annotated[
        str | None,
        flag(
            "--loader",
            "|".join(LOADERS),
            "Keep images in memory (the default), read their files batch by batch, or FFCV's (see prepare): the same "
            "batches, bit for bit.",
            _IMAGES,
        ),
    ] = None,
    level: Annotated[
        str | None, flag("--level", "|".join(LEVELS), "What is predicted. Default: the next word.", _TEXTS)
    ] = None,
    window: Annotated[
        int | None, flag("--window", "N", "Places of the text in a step: how far gradients go back.", _TEXTS, whole)
    ] = None,
    over_time: Annotated[
        str | None,
        flag(
            "--over-time",
            "|".join(OVER_TIME),
            "How the losses of a window's places become its own; sum, the default, is the paper's scale of --lr.",
            _TEXTS,
        ),
    ] = None,
    model: Annotated[
        str | None,
        flag(
            "--model",
            "M",
            "Network of every generation: wrn-28-1, densenet-90-60, lstm-1500, timm:NAME, package.module:factory, ...",
            _NETWORKS,
        ),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        flag(
            "--model-option",
            "KEY=VALUE",
            "Argument of that network, memory=shared for example; repeatable.",
            _NETWORKS,
        ),
    ] = None,
    objective: Annotated[
        str | None, flag("--objective", "O", f"What students learn from: {', '.join(OBJECTIVES)}.", _NETWORKS)
    ] = None,
    students: Annotated[
        str | None,
        flag(
            "--students",
            "O,O,...",
            "Instead of one: a student for each of these objectives, side by side on one teacher, in DIR/O "
            "(ban+l in DIR/ban_l).",
            _NETWORKS,
        ),
    ] = None,
    kd_weight: Annotated[
        float | None, flag("--kd-weight", "F", "Weight of the teacher's outputs. Default: 1.", _NETWORKS, real)
    ] = None,
    label_weight: Annotated[
        float | None,
        flag("--label-weight", "F", "Weight of the labels. Default: 1 for ban+l, else 0.", _NETWORKS, real),
    ] = None,
    temperature: Annotated[
        float | None, flag("--temperature", "F", "Temperature of both softmaxes. Default: 1.", _NETWORKS, real)
    ] = None,
    generations: Annotated[
        int | None,
        flag("--generations", "N", "Students after the teacher; 0 trains the teacher alone.", _NETWORKS, whole),
    ] = None,
    teacher: Annotated[
        str | None,
        flag(
            "--teacher",
            "|".join(TEACHERS),
            "Ask the teacher for each batch, or keep its outputs for each view of an image. Default: auto, by what "
            "that saves; the same bits either way with --cache-dtype fp32.",
            _NETWORKS,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        flag(
            "--cache-dtype",
            "|".join(CACHE_DTYPES),
            "Of outputs kept; fp32, the default, is exact. In fp16 and bf16 dkpp takes the argmax of rounded outputs.",
            _NETWORKS,
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        flag(
            "--cache-dir",
            "DIR",
            "Keep outputs there, for other runs too. Default: in the run or sweep, until its students are trained.",
            _NETWORKS,
        ),
    ] = None,
    cache_fill: Annotated[
        str | None,
        flag(
            "--cache-fill",
            "|".join(CACHE_FILLS),
            "Compute outputs when a view is first shown, or all before training. Default: lazy; the same bits.",
            _NETWORKS,
        ),
    ] = None,
    fold_teacher: Annotated[
        str | None,
        flag(
            "--fold-teacher",
            "|".join(FOLDS),
            "Fold its batch norms: the same but for rounding. Default: auto, on a GPU.",
            _NETWORKS,
        ),
    ] = None,
    epochs: Annotated[
        int | None, flag("--epochs", "N", "Passes over the training data, for each generation.", _TRAINING, whole)
    ] = None,
    max_steps: Annotated[
        int | None, flag("--max-steps", "N", "Stop each generation after N optimizer steps.", _TRAINING, whole)
    ] = None,
    batch_size: Annotated[
        int | None, flag("--batch-size", "N", "Images, or streams of a text, a step.", _TRAINING, whole)
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        flag(
            "--micro-batch-size",
            "N",
            "Images at a time through the network, where a batch needs too much memory; gradients add up.",
            _TRAINING,
            whole,
        ),
    ] = None,
    sync_statistics: Annotated[
        bool | None,
        switch(
            "--sync-statistics/--no-sync-statistics",
            "Under torchrun: batch norm by the statistics of whole batches, not of each process's share.",
            _TRAINING,
        ),
    ] = None,
    lr: Annotated[float | None, flag("--lr", "F", "Peak learning rate.", _TRAINING, real)] = None,
    weight_decay: Annotated[
        float | None, flag("--weight-decay", "F", "L2 penalty on every parameter.", _TRAINING, real)
    ] = None,
    schedule: Annotated[
        str | None, flag("--schedule", "S", f"Learning-rate schedule: {', '.join(SCHEDULES)}.", _TRAINING)
    ] = None,
    lr_decay: Annotated[
        float | None, flag("--lr-decay", "F", "Factor of schedules step and plateau.", _TRAINING, real)
    ] = None,
    clip_norm: Annotated[
        float | None, flag("--clip-norm", "F", "Scale gradients down to this norm, all together.", _TRAINING, real)
    ] = None,
    device: Annotated[str | None, flag("--device", "|".join(DEVICES), "Where to train.", _MACHINE)] = None,
    amp: Annotated[str | None, flag("--amp", "|".join(AMP_MODES), "Mixed precision.", _MACHINE)] = None,
    step: Annotated[
        str | None,
        flag(
            "--step",
            "|".join(STEPS),
            "Make each step operation by operation, through torch.compile, or as one CUDA graph. Default: auto, a "
            "graph where all of a step can be recorded.",
            _MACHINE,
        ),
    ] = None,
    compile: Annotated[bool | None, switch("--compile/--no-compile", "The same as --step compile.", _MACHINE)] = None,
) -> int:
    """Train a teacher, then students of the same architecture, each on the outputs of the one before.

    Without flags: a teacher and three students on the bundled digits.
    """
    from . import commands

    return commands.train(ctx.obj, ctx.params)
