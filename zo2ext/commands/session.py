"""A model that a command trains: loaded into the store of an engine, and left there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo2ext._format import gib
from zo2ext.checkpoints.pretrained import check_vocabulary
from zo2ext.config import RankSettings, ZOConfig, config_from
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.load import load
from zo2ext.errors import UserError
from zo2ext.journal.journal import JOURNAL_FILE
from zo2ext.parallel.mesh import Mesh
from zo2ext.parallel.parallel import Parallel, rank_and_world_size
from zo2ext.planning.directions import with_directions_of


@contextmanager
def open_model(
    source: str,
    settings: Any,
    config: ZOConfig,
    *,
    max_token: int,
    parallel: Parallel | None = None,
) -> Iterator[tuple[Any, ZOEngine]]:
    """Open a causal language model and its engine until the block ends.

    The weights are never in the model's own memory.

    Args:
        source: Folder or hub name.
        settings: Config of the model, from `pretrained.load_config`.
        config: Settings of the engine.
        max_token: Largest token id in the data.
        parallel: This process's place among several that train the model together.

    Raises:
        ValueError: The model does not exist, its files are damaged or incomplete, or its
            vocabulary lacks `max_token`.
    """
    check_vocabulary(source, settings, max_token=max_token)
    model, engine = load(source, config, parallel=parallel)
    try:
        yield model, engine
    except BaseException as error:
        engine.fail(error)
        raise
    finally:
        engine.close(keep_weights=False)


def memory_line(engine: ZOEngine) -> str:
    """Return a line on the memory of a run and the rounding error of its stored weights."""
    error = engine.rounding_error
    stored = f" (stored with a {error})" if error.squares else ""
    return (
        f"memory  {gib(engine.host_nbytes)} of weights on the host{stored}, "
        f"{gib(engine.device_nbytes)} of buffers on {engine.config.device or engine.device}"
    )


def config_of_run(arguments: Any) -> ZOConfig:
    """Return the settings of the run in the folder ``arguments.out``, new or to be continued."""
    config = config_from(arguments)
    if arguments.overwrite:
        return config
    return with_directions_of(config, Path(arguments.out) / JOURNAL_FILE)


def parallel_of(arguments: RankSettings) -> Parallel | None:
    """Return this process's place among those of ``torchrun``; None if it is the only one.

    Raises:
        ValueError: An option does not fit the number of processes or directions.
    """
    _, ranks = rank_and_world_size()
    perturb, direction = arguments.perturb_parallel, arguments.direction_parallel
    each = perturb * direction
    Mesh(1, direction, perturb).check(config_from(arguments))
    if ranks == 1 and each > 1:
        raise UserError(
            f"perturb_parallel x direction_parallel is {each}, but this is a single process; start "
            f"with torchrun --nproc-per-node {each} -m zo2ext train ..."
        )
    if ranks % each:
        raise UserError(
            f"perturb_parallel x direction_parallel is {each}, which does not divide the {ranks} "
            "processes"
        )
    if not arguments.deadline > 0:
        raise UserError(f"deadline must be above 0 seconds, got {arguments.deadline:g}")
    if ranks == 1:
        return None
    return Parallel.from_environment(
        perturb=perturb, direction=direction, deadline=arguments.deadline
    )
