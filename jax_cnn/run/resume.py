"""Going on with a run: what may differ from when it started, and the command that goes on."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from jax_cnn.checkpoint import Checkpoint
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.run.checkpoints import newest_checkpoint

# What changes no weight's bits, or not the weights of the epochs that are done. All else has to be as it was.
FREE = {
    *("epochs", "data_dir", "out_dir", "resume", "checkpoint_seconds"),
    *("dialect", "coordinator", "num_processes", "process_id"),
}
ROUNDING = {"device", "devices"}  # what may change a weight's last bits


def run_record(config: TrainConfig, record: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run: the configuration as JSON, and where and with what it is computed."""
    loaded: dict[str, Any] = json.loads(json.dumps({"config": asdict(config)} | record, default=str))
    return loaded


def check_resumable(config: TrainConfig, framework: str, say: Callable[[str], None]) -> None:
    """Refuse what `checkpoint_to_resume` would refuse, before anything is loaded or compiled.

    Args:
        config: what is asked for; nothing is done unless it asks to resume.
        framework: that is to compute it.
        say: shows a line to the user: the checkpoints that were passed over, if none is left.

    Raises:
        UserError: there is no checkpoint in its folder, or it belongs to another run.
    """
    if not config.resume:
        return
    passed_over: list[str] = []
    try:
        found = newest_checkpoint(config.out_dir, passed_over.append)
    except UserError:
        for line in passed_over:
            say(line)
        raise
    origin = {"framework": framework, "versions": {}, "machine": {"cpu": None}}  # the rest is no reason to refuse
    refuse_another_run(config, found, run_record(config, origin))


def checkpoint_to_resume(config: TrainConfig, run: dict[str, Any], say: Callable[[str], None]) -> Checkpoint:
    """Find the newest good checkpoint of this very run in its folder.

    Args:
        config: what is asked for now.
        run: its `run_record`.
        say: shows a line to the user: what was passed over, and what is no longer as it was.

    Raises:
        UserError: there is none, or it belongs to another run.
    """
    found = newest_checkpoint(config.out_dir, say)
    refuse_another_run(config, found, run)
    if changed := differences(config, found, run):
        listing = "; ".join(describe(name, *pair) for name, pair in changed.items())
        say(f"not as it was: {listing}. The weights may differ in their last bits from an uninterrupted run's")
    return found


def refuse_another_run(config: TrainConfig, found: Checkpoint, run: dict[str, Any]) -> None:
    """Hold a checkpoint to what is asked for.

    Raises:
        UserError: it would not be the same run, or it has gone further already.
    """
    changed = differences(config, found, run)
    last_bits = {*ROUNDING, "cpu", *run["versions"], *dict(found.run["versions"])}
    other = [describe(name, *pair) for name, pair in changed.items() if name not in last_bits]
    if other:
        raise UserError(
            f"--resume: {config.out_dir} holds another run: {'; '.join(other)}; ask for what it was, or choose another "
            "--out-dir"
        )
    if found.progress.epoch > config.epochs:
        raise UserError(
            f"--resume: the run in {config.out_dir} has finished {found.progress.epoch} epochs, more than --epochs "
            f"{config.epochs}; ask for as many or more"
        )


def differences(config: TrainConfig, found: Checkpoint, run: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What may matter and was otherwise: before and now, under the names of the flags.

    A flag that an earlier version did not know had its default then.
    """
    defaults = flat(run_record(type(config)(), {name: run[name] for name in ("framework", "versions", "machine")}))
    before, now = flat(found.run), flat(run)
    for name in asdict(config).keys() & defaults.keys():
        before.setdefault(name, defaults[name])
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in FREE}


def flat(run: dict[str, Any]) -> dict[str, Any]:
    """What a run is made of, under the names of the flags; versions under those of the packages."""
    try:
        config = dict(run["config"])
        config |= config.pop("adam")
        return config | dict(run["versions"]) | {"framework": run["framework"], "cpu": run["machine"]["cpu"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            "--resume: the checkpoint does not say what run it belongs to; start without --resume"
        ) from None


def describe(name: str, before: object, now: object) -> str:
    """One difference."""
    return f"{name.replace('_', '-')} was {before}, not {now}"


def how_to_resume() -> str:
    """The command that goes on where this one stops."""
    flags = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["python", sys.argv[0], *flags, "--resume"])
