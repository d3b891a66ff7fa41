"""A text as a task: its windows as batches, a recurrent network as every generation, perplexity as its figure."""

import hashlib

import torch
from torch import Tensor, nn

from .. import data, models
from ..config import Config, DataConfig, ModelConfig
from ..data import Corpus, Level, TextLoader
from ..errors import OptionError, UserError, first_line
from ..models.checks import whole
from .distributed import ALONE, Ranks
from .reader import Carried
from .seeds import isolated
from .step_choice import COMPILE
from .task import ModelFactory, Task, Views, hash_of, placed, structure, trainable_parameters
from .text_evaluator import TextEvaluator

EVALUATION_WINDOW = 2048
"""Places at a time where nothing is trained. The text is one stream then, so that no token lacks what came before.

For lstm-1500 on two CPU cores a window costs 0.73 ms a place, and 91 ms before the first: 0.76 ms with 2,048 places,
0.91 with 512, 1.44 with 128. Two streams at once would cost more a token than one.
"""
EVALUATION_LOGITS = 1 << 25
"""Of a window at most, but for 64 places: 128 MiB in fp32."""

Letters = tuple[Tensor, int]
"""The words of a vocabulary as characters, [V, window], and how many characters there are."""


def text_task(config: Config, device: torch.device, model: ModelFactory | None, ranks: Ranks = ALONE) -> Task:
    """Read the text, build the network once to see that it fits, and change nothing on disk."""
    level: Level = "character" if config.text.level == "character" else "word"
    corpus = data.load_corpus(config.data.name, directory=config.data.directory, level=level)
    _refuse_what_is_for_images(config)  # now that the text is there: a name mistyped begins with an images' recipe
    _check_shards(config, ranks)
    if config.amp == "fp16" and device.type == "cpu":
        raise OptionError("amp", "on the CPU there are no recurrent networks in fp16; use bf16 or off")
    train = TextLoader(
        corpus.train, batch_size=config.batch_size, length=config.text.window, device=device, shard=ranks.shard
    )
    words, rows_per_step = len(corpus.vocabulary), config.batch_size * config.text.window
    evaluation = {
        name: TextLoader(text, batch_size=1, length=_evaluation_window(words), training=False, device=device)
        for name, text in (("test", corpus.test), (TextEvaluator.validation, corpus.valid))
    }
    letters = _letters(config.model, corpus) if model is None else None
    factory = model or language_model(config.model, words, letters)
    with isolated(device, seed=0):
        network = placed(factory(), device, channels_last=False)
        _check_outputs(network, words, device)
    if trainable_parameters(network) == 0:
        raise UserError("the network has no parameter that requires a gradient: nothing to train")
    views = Views(
        samples=train.steps_per_epoch * rows_per_step,
        each=1,
        description=f"windows of {config.text.window} of {config.batch_size} streams",
        fingerprint=lambda: hash_of([corpus.train], "tokens"),
    )
    return Task(
        device=device,
        train=lambda seed: train,
        evaluator=lambda seed, should_stop: TextEvaluator(dict(evaluation), device, seed, should_stop, ranks),
        reader=lambda network: Carried(network, ranks),
        factory=factory,
        channels_last=False,
        shape={
            "sample_shape": list(train.sample_shape),
            "classes": words,
            "vocabulary": _hash(corpus),
            "characters": None if letters is None else {"count": letters[1], "window": letters[0].shape[1]},
            "steps_per_epoch": train.steps_per_epoch,
            "train_tokens": len(corpus.train),
            **{f"{name}_tokens": len(loader) for name, loader in evaluation.items()},
            "parameters": trainable_parameters(network),
        },
        structure=structure(network),
        has_batch_norm=False,
        views=views if ranks.is_alone else None,
        unit="tokens",
        rows_per_step=rows_per_step,
        is_fixed=True,
        ranks=ranks,
        loss_factor=float(config.text.window) if config.text.over_time == "sum" else 1.0,
    )


def _evaluation_window(words: int) -> int:
    """Places of a window in evaluation, for a vocabulary of so many words."""
    return min(EVALUATION_WINDOW, max(64, EVALUATION_LOGITS // words))


def _check_shards(config: Config, ranks: Ranks) -> None:
    """OptionError for streams that these processes can't share, or outputs that they don't keep."""
    if config.batch_size % ranks.size:
        raise OptionError(
            "batch_size",
            f"{config.batch_size} streams can't be shared evenly by {ranks.size} processes: use a multiple of that",
        )
    if not ranks.is_alone and config.teacher.mode == "cache":
        raise OptionError("teacher.mode", "several processes keep no outputs of a text: use live, or one process")


def language_model(config: ModelConfig, words: int, letters: Letters | None) -> ModelFactory:
    """The factory of a language model of so many words; `letters` for one that reads them."""
    if models.reads(config.name) == "images":
        raise OptionError("model.name", f"{config.name} reads images, and the data are a text: use lstm-200, cnn-lstm")
    for known in ("name", "num_classes", "table", "characters"):
        if known in config.options:
            raise OptionError("model.options", f"{known} is not an option: it is known already; leave it out")
    options = dict(config.options)
    if letters is not None:
        table, count = letters
        options |= {"table": table, "characters": count, "window": table.shape[1]}
    return lambda: models.create(config.name, words, **options)


def _letters(config: ModelConfig, corpus: Corpus) -> Letters | None:
    """What a network that reads words' characters is given."""
    if not models.needs_characters(config.name):
        return None
    window = config.options.get("window")
    try:
        table, names = corpus.characters(None if window is None else whole("window", window))
    except UserError as error:
        raise OptionError("model.name" if window is None else "model.options", str(error)) from error
    if window is None and table.shape[1] < models.LEAST_WINDOW:
        table, names = corpus.characters(models.LEAST_WINDOW)
    return table, len(names)


def _refuse_what_is_for_images(config: Config) -> None:
    name = config.data.name
    for field, value in (
        ("image_size", None),
        ("padding", DataConfig.padding),
        ("val_fraction", 0.0),
        ("limit_train", None),
        ("limit_test", None),
        ("loader", DataConfig.loader),
    ):
        if getattr(config.data, field) != value:
            raise OptionError(f"data.{field}", f"is for images, and {name} is a text; leave it out")
    if config.data.augmentation not in ("auto", "none"):
        raise OptionError("data.augmentation", f"is for images, and {name} is a text; leave it out")
    if config.channels_last:
        raise OptionError("channels_last", f"is for images, and {name} is a text; leave it out")
    if config.micro_batch_size is not None:
        raise OptionError(
            "micro_batch_size",
            f"divides batches of images, and {name} is a text; a smaller --batch-size has fewer streams",
        )
    if config.teacher.cache_fill != "lazy":
        raise OptionError(
            "teacher.cache_fill", f"is for images, and {name} is a text, all read in an epoch; leave it out"
        )
    if config.steps == COMPILE:
        raise OptionError("step", "torch.compile does not take recurrent networks; use auto, and no --compile")


@torch.no_grad()
def _check_outputs(network: nn.Module, words: int, device: torch.device) -> None:
    """UserError unless the network makes logits of two windows of blank tokens, its state carried between them."""
    tokens = torch.zeros(2, 1, dtype=torch.int64, device=device)
    try:
        _, state = network.eval()(tokens, None)
        logits, _ = network(tokens, state)
    except UserError:
        raise
    except Exception as error:  # as libraries' networks see fit: TypeError, ValueError, RuntimeError, more
        raise UserError(f"the network does not take (tokens [T, B], state): {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.shape != (2, 1, words):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the network must return logits [T, B, {words}] and its state, got {got} for tokens [2, 1]")


def _hash(corpus: Corpus) -> str:
    """Of the vocabulary: another one of the same size would give every weight another meaning."""
    return hashlib.blake2b("\n".join(corpus.vocabulary).encode(), digest_size=8).hexdigest()
