"""The flags of `ban-fast sweep`: its own, then those of train."""

from typing import Annotated

import typer

from .declare import flag, real, switch, whole
from .inherit import with_flags_of
from .train_flags import train

_SWEEP = "Sweep"


@with_flags_of(train, without={"seed", "students", "out", "resume"})
def sweep(
    ctx: typer.Context,
    seeds: Annotated[
        str | None, flag("--seeds", "N,N,...", "A run for each of these seeds; 0-4 stands for 0,1,2,3,4.", _SWEEP)
    ] = None,
    vary: Annotated[
        list[str] | None,
        flag(
            "--vary",
            "KEY=V,V,...",
            "A run for each of these values of a flag of train (objective=ban,ban+l) or a configuration key "
            "(optimizer.momentum=0,0.9); repeatable: every combination.",
            _SWEEP,
        ),
    ] = None,
    paper: Annotated[
        int | None,
        flag("--paper", "1|2|3|6", "Instead, the runs of that table of the paper; weeks of a GPU.", _SWEEP, whole),
    ] = None,
    out: Annotated[
        str | None,
        flag("--out", "DIR", "Directory of the study, each run in DIR/NAME. Default: runs/sweep-...", _SWEEP),
    ] = None,
    resume: Annotated[
        bool, switch("--resume", "Do what is left of the study in --out; its flags may be left out.", _SWEEP)
    ] = False,
    engine: Annotated[
        str | None,
        flag(
            "--engine",
            "auto|local|ray",
            "Processes of this machine, or Ray's cluster, whose machines must share --out. Default: Ray if RAY_ADDRESS "
            "is set.",
            _SWEEP,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        flag("--workers", "N", "Runs at once. Default: one for each GPU, or core.", _SWEEP, whole),
    ] = None,
    cpus_per_run: Annotated[
        float | None,
        flag("--cpus-per-run", "F", "Cores, and so threads, of each. Default: an equal share.", _SWEEP, real),
    ] = None,
    gpus_per_run: Annotated[
        float | None, flag("--gpus-per-run", "F", "GPUs of each; 0.5 lets two runs share one.", _SWEEP, real)
    ] = None,
    retries: Annotated[
        int | None,
        flag("--retries", "N", "Times that a run is tried again from its checkpoint. Default: 2.", _SWEEP, whole),
    ] = None,
) -> int:
    """Train many runs: seeds, objectives, networks, or whatever is varied; all other flags are those of train.

    Runs that would train the same teacher share one, and what it says. A table of means and standard deviations over
    seeds ends it.
    """
    from .sweep import sweep as execute

    return execute(ctx.obj, ctx.params)
