"""The figures of a run directory, computed anew from its weights."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..evaluation import RunDirectory
from ..evaluation.run_directory import MODEL
from .checkpoint import load_model
from .evaluator import TEST
from .jobs import make_task
from .run_store import stored_config
from .seeds import generation_seed, isolated
from .task import ModelFactory, Samples, Task, training_device, with_own


def evaluate_run(
    path: str | os.PathLike[str],
    *,
    members: Sequence[int] | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
) -> dict[str, Any]:
    """results.json of the run in `path`, every figure in it computed anew from the stored weights.

    But for what it says of a language model's best epoch, whose weights are not kept unless it was the last.

    On the machine and with the threads of the run the figures are the same to the last bit.

    Args:
        path: the run directory.
        members: generations, 0 (the teacher) among them if wanted: then only their records are there, and their one
            ensemble by either average. None: all, and the run's own ensembles.
        data_dir: where the data lie. None: where the run had them.
        device: "cpu", "cuda", or "auto": CUDA where there is a device.
        model: the caller's own, for a run that was given it, as for `run`.
        train: likewise.
        test: likewise.
        validation: likewise.

    Raises:
        UserError: not a run directory, nothing finished in it, members that it has not, damaged files, missing data.
    """
    directory = RunDirectory(path)
    config = stored_config(directory)
    if data_dir is not None:
        config.data.directory = data_dir
    results = directory.results()
    finished = results["generations"]
    chosen = _members(members, len(finished), directory)
    # How they were trained asks nothing here: figures are computed in full precision, from whatever holds the images.
    if config.data.loader == "ffcv":
        config.data.loader = "torch"
    config = dataclasses.replace(config, device=device, amp="off")
    config = with_own(config, model, train, [test, validation])
    config.validate()
    place = training_device(device)
    with isolated(place):
        task = make_task(config, place, model=model, train=train, test=test, validation=validation)
        _check_vocabulary(directory, task)
        evaluator = task.evaluator(config.seed, lambda: False)
        records: list[dict[str, Any]] = []
        test_outputs: dict[int, Tensor] = {}
        for number in chosen:
            network = task.network(generation_seed(config.seed, number))
            load_model(directory.generation(number) / MODEL, network, finished[number].get("model_sha256"))
            outputs = {split: evaluator.outputs(network, split) for split in evaluator.splits}
            records.append({**finished[number], **evaluator.record(outputs)})
            test_outputs |= {number: outputs[TEST]} if TEST in outputs else {}
        ensembles: list[dict[str, Any]] = []
        if TEST in evaluator.splits:
            votes = [chosen] if members is not None else [range(1, n + 1) for n in range(2, len(finished))]
            for vote in votes:
                ensembles += evaluator.ensembles(list(vote), [test_outputs[member] for member in vote])
    return {"format": results["format"], "generations": records, "ensembles": ensembles}


def _check_vocabulary(directory: RunDirectory, task: Task) -> None:
    """UserError where the words of a text are not those that a run's networks know."""
    then = directory.environment().get("shape", {})
    for key in ("classes", "vocabulary"):
        if "vocabulary" in then and then[key] != task.shape.get(key):
            raise UserError(
                f"the networks in {directory.path} know a text of {key} {then[key]}, here it is {task.shape.get(key)}: "
                "name the directory of theirs"
            )


def _members(members: Sequence[int] | None, finished: int, directory: RunDirectory) -> list[int]:
    if finished == 0:
        raise UserError(f"no generation of the run in {directory.path} is finished: go on with it by --resume first")
    if members is None:
        return list(range(finished))
    chosen = list(members)
    if not chosen:
        raise UserError(f"members must name generations of 0..{finished - 1}, got none")
    for member in chosen:
        if isinstance(member, bool) or not isinstance(member, int) or not 0 <= member < finished:
            raise UserError(f"members must be finished generations, 0..{finished - 1} here, got {member!r}")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"members must be different generations, got {','.join(map(str, chosen))}")
    return chosen
