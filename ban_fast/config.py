"""Everything a run is made of, as keyword-only dataclasses. `Config.to_dict` is a run's config.json."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import OptionError, UserError, suggest
from .option_checks import at_least, choice, finite, of_type

OBJECTIVES = ("label", "ban", "ban+l", "cwtm", "dkpp")
STUDENT_FOLDERS = {name: name.replace("+", "_") for name in OBJECTIVES}
"""Where each of several students has its run, below the directory of all."""
SCHEDULES = ("step", "cosine", "onecycle", "constant", "plateau")
PLATEAUS = ("best", "previous")
AMP_MODES = ("off", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
AUGMENTATIONS = ("auto", "none", "crop", "crop+flip")
UNBOUNDED = ("mixup", "cutmix", "cutout", "randaugment", "autoaugment", "trivialaugment")
"""Augmentations that are known by name, and change an image in endless ways."""
PADDINGS = ("reflect", "zero")
LOADERS = ("memory", "torch", "ffcv")
FREE = {"data.directory", "data.loader", "teacher.cache_directory", "teacher.cache_fill", "checkpoint_seconds"}
"""What may differ between a run and its continuation: nothing that is computed depends on it."""
TEACHERS = ("live", "cache", "auto")
STEPS = ("auto", "eager", "compile", "graph")
CACHE_DTYPES = ("fp32", "fp16", "bf16")
CACHE_FILLS = ("lazy", "ahead")
FOLDS = ("auto", "on", "off")
LEVELS = ("word", "character")
OVER_TIME = ("sum", "mean")
_COLDEST, _HOTTEST = 1e-18, 1e18
"""Temperatures that the losses take."""


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and what is done to them; or which text."""

    name: str = "digits"
    """A dataset's name (`ban_fast.data.names()`), or a folder laid out as train/CLASS/* and test/CLASS/*; "ptb", or a
    folder with train.txt, valid.txt and test.txt."""
    directory: str | None = None
    """The dataset's own directory or its parent. None: $BAN_FAST_DATA, else ~/.cache/ban_fast."""
    image_size: int | None = None
    """Side in pixels that images of a folder are resized to. None: the dataset's own (folders: 32)."""
    augmentation: str = "auto"
    """"crop" (random crop after padding), "crop+flip", "none", or "auto": what the dataset is usually given."""
    padding: str = "reflect"
    """How the 4 pixels around an image are filled before a crop: "reflect" or "zero"."""
    val_fraction: float = 0.0
    """Share of the training images held out, in [0, 1). The test images are never touched by it."""
    limit_train: int | None = None
    """Keep only this many training images. None: all."""
    limit_test: int | None = None
    """Keep only this many test images. None: all."""
    loader: str = "memory"
    """Where batches come from: "memory", "torch" (a DataLoader reads the files, for datasets larger than memory) or
    "ffcv" (the files that `ban-fast prepare --format ffcv` writes). The same batches, bit for bit, from all three."""

    def check(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        _check_augmentation(self.augmentation)
        choice("data.padding", self.padding, PADDINGS)
        choice("data.loader", self.loader, LOADERS)
        for name in ("image_size", "limit_train", "limit_test"):
            at_least(f"data.{name}", getattr(self, name), 1)
        if not 0 <= self.val_fraction < 1:
            raise OptionError("data.val_fraction", f"must be in [0, 1), got {self.val_fraction}")


@dataclass(kw_only=True)
class TextConfig:
    """How a text is read, if the data are one."""

    level: str = "word"
    """What is predicted: the next "word" or the next "character"."""
    window: int = 35
    """Places of the text in a batch, which has `Config.batch_size` streams of them: how far gradients go back."""
    over_time: str = "sum"
    """How the losses of a window's places become its own: their "sum", averaged over streams (as the paper's learning
    rates and gradient norms count), or their "mean", which is smaller by the window's length."""

    def check(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        choice("text.level", self.level, LEVELS)
        choice("text.over_time", self.over_time, OVER_TIME)
        at_least("text.window", self.window, 1)


@dataclass(kw_only=True)
class ModelConfig:
    """Which network every generation is."""

    name: str = "convnet-24"
    """A name that `ban_fast.models.create` knows; "custom" where the caller passed a factory of their own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that network, `memory="checkpoint"` for example."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What a student is trained on. The teacher, generation 0, is always trained on labels."""

    name: str = "ban"
    """"label", "ban" (the teacher's outputs alone), "ban+l" (with labels), "cwtm" or "dkpp"."""
    temperature: float = 1.0
    """Both softmaxes' temperature; the KD term is multiplied by its square. Not for label and cwtm."""
    kd_weight: float | None = None
    """Weight of the KD term. None: 1. Not for label and cwtm, which have none."""
    label_weight: float | None = None
    """Weight of the label term. None: 1 for ban+l, else 0. For ban+l and dkpp alone."""

    def weights(self) -> tuple[float, float]:
        """(kd_weight, label_weight) with the defaults of the objective filled in."""
        kd = 1.0 if self.kd_weight is None else self.kd_weight
        label = (1.0 if self.name == "ban+l" else 0.0) if self.label_weight is None else self.label_weight
        return kd, label

    def check(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        choice("objective.name", self.name, OBJECTIVES)
        for name in ("temperature", "kd_weight", "label_weight"):
            finite(f"objective.{name}", getattr(self, name), positive=name == "temperature")
        if not _COLDEST <= self.temperature <= _HOTTEST:
            raise OptionError("objective.temperature", f"must be from {_COLDEST} to {_HOTTEST}, got {self.temperature}")

    def check_terms(self) -> None:
        """Raise OptionError for a setting of a term that this objective does not have."""
        if self.name in ("label", "cwtm") and self.temperature != 1:
            raise OptionError("objective.temperature", f"objective {self.name!r} has no temperature; leave it at 1")
        if self.name in ("label", "cwtm") and self.kd_weight is not None:
            raise OptionError("objective.kd_weight", f"objective {self.name!r} has no KD term")
        if self.name in ("label", "ban", "cwtm") and self.label_weight is not None:
            raise OptionError(
                "objective.label_weight", f"objective {self.name!r} has no label term to weigh; use 'ban+l'"
            )
        if self.weights() == (0, 0):
            raise OptionError("objective.kd_weight", "is 0, and so is the labels' weight: nothing is left to learn")


@dataclass(kw_only=True)
class TeacherConfig:
    """How students get their teacher's outputs."""

    mode: str = "auto"
    """"live" (a forward pass for each batch), "cache" (one for each view of an image that is shown, kept), or "auto":
    the cache where it saves enough, fits and, with `cache_dtype` "fp32", gives the live teacher's very bits."""
    cache_dtype: str = "fp32"
    """Of the rows kept: "fp32" (exact), "fp16" or "bf16" (half the size; 2^-11 and 2^-8 of a logit are rounded off).
    DKPP's argmax is the rounded row's: the lowest index of its largest value, which before may have been another's."""
    cache_directory: str | None = None
    """Where caches lie, each in a folder of its own, for other runs to read too. None: in the run's own directory,
    until the students of that teacher are trained."""
    cache_fill: str = "lazy"
    """When its rows are computed: "lazy" (a view when it is first shown) or "ahead" (all that a generation's epochs
    will show, before its first step; on a GPU in large batches where those give the same bits)."""
    fold: str = "auto"
    """Whether its batch norms are folded, which is exact but for rounding: "on", "off", or "auto": on a GPU, where that
    saves a pass over memory for each, and the network's operations can be followed."""

    def check(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        choice("teacher.mode", self.mode, TEACHERS)
        choice("teacher.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        choice("teacher.cache_fill", self.cache_fill, CACHE_FILLS)
        choice("teacher.fold", self.fold, FOLDS)
        for name in ("cache_directory", "cache_dtype", "cache_fill"):
            if self.mode == "live" and getattr(self, name) != getattr(TeacherConfig, name):
                raise OptionError(f"teacher.{name}", "a live teacher has no cache; leave it out")


@dataclass(kw_only=True)
class OptimizerConfig:
    """SGD and its learning-rate schedule; the defaults are the paper's."""

    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of it."""
    weight_decay: float = 5e-4
    """L2 penalty on every trainable parameter, batch-norm and biases included."""
    schedule: str = "step"
    """"step" (lr_decay at each milestone), "cosine", "onecycle", "constant", or "plateau": lr_decay after each epoch
    whose figure on the validation split (error, perplexity) is not below the one that `plateau_against` names."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Shares of the run at which "step" multiplies the learning rate by lr_decay."""
    lr_decay: float = 0.2
    """Factor of "step" and "plateau"."""
    plateau_threshold: float = 0.0
    """By how much the figure must be below that one, at least, for "plateau" to leave the learning rate as it is."""
    plateau_against: str = "best"
    """What "plateau" compares an epoch's figure with: the "best" of all before it (as MXNet's word_lm does) or that of
    the "previous" one (as Kim et al. do, and the paper's "after an epoch" reads). After an epoch that got worse, the
    second forgives one that makes up for a part of it: 110 then 105, after 100."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters together; one above it is scaled down to it. None: any."""

    def check(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        choice("optimizer.schedule", self.schedule, SCHEDULES)
        choice("optimizer.plateau_against", self.plateau_against, PLATEAUS)
        for name in ("lr", "lr_decay", "clip_norm"):
            finite(f"optimizer.{name}", getattr(self, name), positive=True)
        for name in ("momentum", "weight_decay", "plateau_threshold"):
            finite(f"optimizer.{name}", getattr(self, name), positive=False)
        if self.nesterov and self.momentum == 0:
            raise OptionError("optimizer.nesterov", "needs a momentum above 0")
        for name in ("plateau_threshold", "plateau_against"):
            if self.schedule != "plateau" and getattr(self, name) != getattr(OptimizerConfig, name):
                raise OptionError(f"optimizer.{name}", "is for schedule plateau; leave it out")
        stones = self.milestones
        if not all(isinstance(m, (int, float)) and 0 < m < 1 for m in stones) or list(stones) != sorted(stones):
            raise OptionError("optimizer.milestones", f"must be rising shares between 0 and 1, got {list(stones)}")


@dataclass(kw_only=True)
class Config:
    """A whole run: a teacher (generation 0) and `generations` students, each taught by the one before."""

    FORMAT: ClassVar[int] = 1

    recipe: str = "custom"
    """The recipe that this configuration began as; for the record."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images, or which text."""
    text: TextConfig = field(default_factory=TextConfig)
    """How a text is read."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What students learn from."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """How they get it from their teacher."""
    students: tuple[str, ...] = ()
    """Objectives of several students trained side by side, each a run of its own beside the others, on one teacher's
    outputs (`run_together`); `objective.name` is not read then. Empty: one student, of that objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How they are updated."""
    generations: int = 3
    """Students after the teacher; 0 trains the teacher alone."""
    epochs: int = 200
    """Passes over the training images or text, for each generation."""
    batch_size: int = 128
    """Images a step; of a text, streams side by side."""
    micro_batch_size: int | None = None
    """Images at a time through the network, whose gradients add up to the batch's. None: the whole batch."""
    sync_statistics: bool = False
    """Where several processes share a batch: batch norm takes its statistics from the whole of it, not from theirs."""
    max_steps: int | None = None
    """Stop each generation after this many optimizer steps. None: epochs alone decide."""
    seed: int = 0
    """Every random draw of the run derives from it."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is a device."""
    amp: str = "off"
    """Mixed precision: "off", "bf16", or "fp16" (with loss scaling)."""
    channels_last: bool = False
    """Keep images and weights in NHWC memory."""
    step: str = "auto"
    """How a step is made. "eager": operation by operation. "compile": forward, loss and backward of a step, and the
    teacher's forward, through torch.compile. "graph": all of a step, from the gather of its images to the update of
    the weights, recorded once as a CUDA graph and replayed, several steps at once where that is found to be faster; the
    bits are eager's. "auto": graph on a GPU where all of a step can be recorded, else eager. results.json says which it
    was, and why."""
    compile: bool = False
    """The same as step "compile"."""
    evaluate_every: int = 1
    """Epochs between two points of the learning curve. The last epoch is always evaluated."""
    checkpoint_seconds: float = 5.0
    """Seconds of training between two checkpoints, at most (and always at the end of a generation)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` takes it back."""
        return {"format": self.FORMAT, **_plain(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The configuration of a config.json. Unknown keys and wrong types are a UserError that names them."""
        if not isinstance(values, dict):
            raise UserError(f"a configuration is a JSON object, got {type(values).__name__}")
        values = dict(values)
        version = values.pop("format", cls.FORMAT)
        if version != cls.FORMAT:
            raise UserError(f"configuration format {version!r} is not known; this version reads format {cls.FORMAT}")
        config: Config = _build(cls, values, "")
        config.validate()
        return config

    def validate(self) -> None:
        """Raise OptionError for the first value that no run could use."""
        sections: dict[str, Any] = {
            "": self,
            "data.": self.data,
            "text.": self.text,
            "model.": self.model,
            "objective.": self.objective,
            "teacher.": self.teacher,
            "optimizer.": self.optimizer,
        }
        for prefix, section in sections.items():
            for f in dataclasses.fields(section):
                if not dataclasses.is_dataclass(getattr(section, f.name)):
                    of_type(prefix + f.name, getattr(section, f.name), _hints(type(section))[f.name])
        for part in (self.data, self.text, self.objective, self.teacher, self.optimizer):
            part.check()
        self._check_run()
        if self.students:
            self._check_students()
        else:
            self.objective.check_terms()

    def _check_run(self) -> None:
        choice("device", self.device, DEVICES)
        choice("amp", self.amp, AMP_MODES)
        choice("step", self.step, STEPS)
        if self.compile and self.step not in ("auto", "compile"):
            raise OptionError("compile", f"is step compile, and step is {self.step}; leave one of them out")
        for name in ("epochs", "batch_size", "micro_batch_size", "max_steps", "evaluate_every"):
            at_least(name, getattr(self, name), 1)
        for name in ("generations", "seed"):
            at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise OptionError("seed", f"must be below 2**63, got {self.seed}")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise OptionError(
                "micro_batch_size", f"must be at most the batch size, {self.batch_size}, got {self.micro_batch_size}"
            )
        finite("checkpoint_seconds", self.checkpoint_seconds, positive=False)
        if self.optimizer.schedule == "plateau" and self.evaluate_every != 1:
            raise OptionError("evaluate_every", f"must be 1 for schedule plateau, got {self.evaluate_every}")

    def _check_students(self) -> None:
        for name in self.students:
            if not isinstance(name, str):
                raise OptionError("students", f"must be names of objectives, got {name!r}")
            choice("students", name, OBJECTIVES)
        if len(set(self.students)) < len(self.students):
            raise OptionError("students", f"must be different objectives, got {','.join(self.students)}")
        learned = [self.of_student(name).objective for name in self.students]
        for objective in learned:
            objective.check_terms()
        for f in dataclasses.fields(ObjectiveConfig):
            is_given = f.name != "name" and getattr(self.objective, f.name) != f.default
            if is_given and all(getattr(objective, f.name) == f.default for objective in learned):
                raise OptionError(f"objective.{f.name}", f"is for none of {', '.join(self.students)}; leave it out")

    @property
    def steps(self) -> str:
        """How steps are to be made, by `step` or by `compile`."""
        return "compile" if self.compile else self.step

    def as_computed(self) -> "Config":
        """The same, with one word for all ways to make steps that give the same bits."""
        return dataclasses.replace(self, step="compile" if self.steps == "compile" else "eager", compile=False)

    def of_student(self, name: str) -> "Config":
        """The configuration of one of `students` as a run of its own, with the settings that its objective has."""
        given = self.objective
        objective = ObjectiveConfig(name=name)
        if name not in ("label", "cwtm"):
            objective.temperature, objective.kd_weight = given.temperature, given.kd_weight
        if name in ("ban+l", "dkpp"):
            objective.label_weight = given.label_weight
        return dataclasses.replace(self, objective=objective, students=())


def _check_augmentation(name: str) -> None:
    plain = "".join(letter for letter in name.lower() if letter.isalpha())
    if plain.startswith(UNBOUNDED):
        raise OptionError(
            "data.augmentation",
            f"{name} changes an image in endless ways; ban_fast's own is the finite crop x flip (crop+flip), so that a "
            "teacher's kept outputs are exact. Bring yours as a DataLoader from Python, run(config, train=loader), "
            "with --teacher live",
        )
    choice("data.augmentation", name, AUGMENTATIONS)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = _hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    made = {}
    for key, value in values.items():
        if key not in names:
            raise UserError(f"unknown configuration key {prefix + key!r}{suggest(key, names)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise OptionError(prefix + key, f"must be an object, got {type(value).__name__}")
            value = _build(hints[key], value, f"{prefix}{key}.")
        elif typing.get_origin(hints[key]) is tuple and isinstance(value, list):
            value = tuple(value)
        made[key] = value
    return cls(**made)
