"""``zo2ext export`` and ``zo2ext verify``: rebuild and check the weights of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from zo2ext._files import check_new_folder
from zo2ext.checkpoints.folders import check_folder
from zo2ext.checkpoints.pretrained import as_user_errors, load_tokenizer
from zo2ext.commands.arguments import ExportArguments, RebuildArguments, VerifyArguments
from zo2ext.config import ONCE, Granularity, ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.offload import offload
from zo2ext.errors import JournalError, UserError
from zo2ext.journal.journal import JOURNAL_FILE, differences, read_journal, repair_journal
from zo2ext.journal.records import Content
from zo2ext.ops.formats import Storage
from zo2ext.runs.log import ARGUMENTS_FILE
from zo2ext.runs.meter import Meter


def export(arguments: ExportArguments) -> None:
    """Run ``zo2ext export``; see `ExportArguments`."""
    check_new_folder(Path(arguments.out), "out")
    with _rebuild(arguments) as (engine, content):
        tokenizer = _tokenizer(arguments, content)
        error = engine.save_pretrained(
            arguments.out,
            tokenizer=tokenizer,
            dtype=None if arguments.dtype is None else Storage.of(arguments.dtype).dtype,
        )
    print(f"weights after {engine.steps} steps: {arguments.out}")
    if arguments.dtype is not None:
        print(f"rounded to {arguments.dtype}: {error}")


def verify(arguments: VerifyArguments) -> None:
    """Run ``zo2ext verify``; see `VerifyArguments`."""
    path = _journal_path(arguments.run)
    content = repair_journal(path) if arguments.repair else read_journal(path)
    _describe(content, path)
    if content.damage is not None and not content.torn:
        raise JournalError(
            f"{path} is damaged: {content.damage}; its first {content.next_step} steps are intact; "
            "--repair keeps them, and a copy of the damaged file"
        )
    if arguments.checkpoint is None:
        return
    with _rebuild(arguments) as (engine, _):
        found = engine.compare(arguments.checkpoint)
    for difference in found[:20]:
        print(f"  {difference.name} {difference.what}")
    if found:
        raise UserError(
            f"{len(found)} tensors of {arguments.checkpoint!r} differ from those of the run "
            f"after {engine.steps} steps"
        )
    print(f"{arguments.checkpoint} equals the run after {engine.steps} steps, bit for bit")


def config_of(content: Content, **changes: Any) -> ZOConfig:
    """Return the settings of a journal's run, with `changes`.

    Raises:
        JournalError: A newer zo2ext wrote settings that this version lacks.
    """
    settings = ONCE | content.header["config"]
    if settings["compute_dtype"] is not None:
        settings["compute_dtype"] = settings["compute_dtype"].removeprefix("torch.")
    try:
        return ZOConfig(**settings, **changes)
    except TypeError as error:
        raise JournalError(f"the journal's settings cannot be used: {error}") from error


@contextmanager
def _rebuild(arguments: RebuildArguments) -> Iterator[tuple[ZOEngine, Content]]:
    """Open an engine of the run's model with the weights after ``arguments.step`` steps."""
    path = _journal_path(arguments.run)
    content = read_journal(path)
    until = content.next_step if arguments.step is None else arguments.step
    if not content.start <= until <= content.next_step:
        raise UserError(
            f"step must be {content.start} to {content.next_step}, the intact steps of {path}, "
            f"got {until}"
        )
    source = _base(arguments, content)
    model = _load(source, content)
    # One matrix at a time, to use little memory.
    config = config_of(content, device=vars(arguments)["device"], granularity=Granularity.MODULE)
    with offload(model, config) as engine:
        _check_base(source, engine.description, content)
        engine.resume(steps=content.start)
        meter = Meter(engine)
        with meter.measure(0):
            engine.replay(content, until=until)
        _report_rate(engine, meter, until - content.start)
        yield engine, content


def _check_base(source: str, found: dict[str, Any], content: Content) -> None:
    expected = {name: content.header[name] for name in found}
    if problems := list(differences(expected, found)):
        raise UserError(
            f"the run did not begin with model {source!r}: {'; '.join(problems[:4])}"
            + (f" ({len(problems)} differences)" if len(problems) > 4 else "")
        )


def _report_rate(engine: ZOEngine, meter: Meter, steps: int) -> None:
    weights = sum(part.numel for layout in engine.layouts for part in layout.parts)
    work = weights * steps * engine.config.count
    seconds = max(meter.seconds, 1e-9)
    print(
        f"replayed {steps} steps over {weights:,} weights in {seconds:.1f} s "
        f"({work / seconds / 1e9:.2f} billion weight updates per second)",
        flush=True,
    )


def _journal_path(run: str) -> Path:
    path = Path(run) / JOURNAL_FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(
            f"run is {run!r}, which is neither a journal nor a folder with a {JOURNAL_FILE}"
        )
    return path


def _base(arguments: RebuildArguments, content: Content) -> str:
    """Return the source of the base weights: the option, or the run's record of it."""
    if arguments.model is not None:
        return arguments.model
    beside = _journal_path(arguments.run).parent / ARGUMENTS_FILE
    settings = json.loads(beside.read_text()) if beside.is_file() else {}
    source = settings.get("model") or content.header["run"].get("model")
    if not isinstance(source, str):
        raise UserError("model is missing: the run has no record of where its base weights are")
    return source


def _load(source: str, content: Content) -> Any:
    """Load the model in the class of the run, with the run's trainable parameters."""
    import transformers

    if Path(source).is_dir():
        check_folder(Path(source))
    with as_user_errors(f"cannot load model {source!r}"):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = _class_of(config, content).from_pretrained(
            source, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    trained = {name: tensor[3] for name, tensor in content.header["tensors"].items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, False))
    return model.eval()


def _class_of(config: Any, content: Content) -> Any:
    """Return the class that the config names or, if that has other parameters than the run, the
    causal language model of this type."""
    import transformers

    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    classes = [found for found in (named if is_model else None, causal) if found is not None]
    for found in classes:
        with torch.device("meta"):
            parameters = dict(found._from_config(deepcopy(config)).named_parameters())
        if parameters.keys() == content.header["tensors"].keys():
            return found
    return (classes or [transformers.AutoModelForCausalLM])[0]


def _tokenizer(arguments: RebuildArguments, content: Content) -> Any:
    source = _base(arguments, content)
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return None
    return load_tokenizer(source)


def _describe(content: Content, path: Path) -> None:
    header = content.header
    trained = sum(tensor[3] for tensor in header["tensors"].values())
    settings = ", ".join(f"{name} {value}" for name, value in header["config"].items())
    print(
        f"journal  {path}, {path.stat().st_size:,} bytes, written by zo2ext {header['zo2ext']}\n"
        f"steps    {content.start} to {content.next_step}, "
        f"{sum(step.skipped for step in content.steps)} of them skipped\n"
        f"model    {len(header['tensors'])} tensors, {trained} of them trained; fingerprint "
        f"{header['fingerprint']}\n"
        f"config   {settings}"
    )
    if content.torn:
        print(f"the last record is incomplete, as after a crash: {content.damage}")
