"""transformers' Trainer with zeroth-order steps.

    trainer = ZOTrainer(model=model, args=ZOTrainingArguments("out"), train_dataset=data)
    trainer.train()

While it trains, evaluates or predicts, a `ZOEngine` streams the model's weights; before and after,
the model is an ordinary one on the CPU with all updates. The forward passes of a step run in
evaluation mode, without dropout, as in MeZO (arXiv:2305.17333).

Every step is recorded in ``output_dir/journal.zo2``. The Trainer's loop begins at its checkpoint,
or at step 0; steps that the journal already has are applied without computing a loss, while data,
schedule and callbacks proceed as they did before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from zo2ext._files import write_atomically
from zo2ext.config import FIND, ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.engine.offload import offload
from zo2ext.errors import JournalError, UserError
from zo2ext.integrations.arguments import ZOArguments, ZOTrainingArguments
from zo2ext.integrations.data_ranks import distribute, weighted_batches
from zo2ext.integrations.describe import describe_batch, describe_run, not_compared
from zo2ext.integrations.progress import ProgressReport
from zo2ext.integrations.random_data import RandomData
from zo2ext.integrations.refusals import check_loss, check_trainer
from zo2ext.integrations.rehearsal import rehearsal
from zo2ext.integrations.token_count import TokenCount, computing_loss
from zo2ext.journal.journal import JOURNAL_FILE, read_journal, set_aside
from zo2ext.model.chunked_loss import chunk_loss
from zo2ext.ops import direction_key
from zo2ext.parallel.parallel import Parallel, SingleProcess, reporting_errors
from zo2ext.planning.directions import with_directions_of
from zo2ext.runs import plots
from zo2ext.runs.checkpoint_state import (
    STATE_FILE,
    TRAINER_STATE_FILE,
    RunState,
    is_complete,
    is_saved,
    last_complete,
)
from zo2ext.runs.find_lr import RATE_PICTURE, RateCurve, described, search
from zo2ext.runs.log import ARGUMENTS_FILE, RunLog
from zo2ext.runs.meter import Meter
from zo2ext.runs.timeline import StepTimeline

__all__ = ["ZOTrainer", "ZOTrainerMixin", "ZOTrainingArguments"]

logger = logging.get_logger(__name__)

_Base: Any = Trainer if TYPE_CHECKING else object
_KNOWN = ("zo2ext.", "transformers.", "trl.", "sentence_transformers.")
TIMELINE_STEP = 10  # steps computed before the one whose timeline is recorded


class ZOOptimizer(torch.optim.Optimizer):
    """Holds the learning rate for schedulers. The engine makes the steps."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the engine's step includes the update."""


@dataclass(frozen=True)
class _MicroBatch:
    loss: Callable[[], Any]
    tokens: int
    weighted: bool


class ZOTrainerMixin(_Base):  # type: ignore[misc]
    """Gives a ``Trainer`` subclass zeroth-order steps: ``class MyTrainer(ZOTrainerMixin, Other)``.

    It overrides the optimizer, the training step, the placement of the model, the content of
    checkpoints, and logging.

    Args:
        args: A `ZOArguments`; all arguments but `engine` are those of ``Trainer``.
        engine: Engine that `zo2ext.load` opened, with its model as ``model``; the caller closes it.
            None: the trainer offloads the model while it trains, evaluates or predicts.

    Attributes:
        engine: Engine in use while training, evaluating or predicting; None otherwise.
    """

    engine: ZOEngine | None = None
    arguments_class: type | None = None  # of the arguments that are used without any
    _total_train_tokens = TokenCount()  # TRL's

    def __init__(self, *args: Any, engine: ZOEngine | None = None, **kwargs: Any) -> None:
        check_trainer(type(self), ZOTrainerMixin)
        self._caller_engine = engine
        if self.arguments_class is not None and args[1:2] in ((), (None,)):
            kwargs["args"] = kwargs.get("args") or self.arguments_class()
            args = args[:1] + args[2:]
        super().__init__(*args, **kwargs)
        self._micro_batches: list[_MicroBatch] = []
        self._steps = self._skipped = 0  # the engine's, while it is closed
        self._resumed: Path | None = None  # checkpoint at which train() began
        self._recorded_until = 0  # steps that the journal had when train() began
        self._batches = 0  # per pass over the data, all data ranks together
        self._begun: ZOEngine | None = None  # engine that _begin was called with
        self._weighted: int | None = None  # micro-batches of the step with weight; None: all
        self._log: RunLog | None = None  # None on ranks other than rank 0
        self._meter: Meter | None = None
        self._logged = self._began = (0, 0)  # steps and skipped ones, at the last log and at first
        self._random_data = RandomData()
        self._rehearsed: float | None = None  # rate of a step that finds the learning rate
        if not isinstance(self.args, ZOArguments):
            expected = getattr(self.arguments_class, "__name__", "a subclass of ZOArguments")
            raise TypeError(f"args must be {expected}, got {type(self.args).__name__}")
        if self.optimizer or self.lr_scheduler or self.optimizer_cls_and_kwargs:
            raise UserError(
                "an optimizer or scheduler of your own cannot be used: the engine makes the steps; "
                "set learning_rate, lr_scheduler_type and lr_scheduler_kwargs"
            )
        for refused, what in (
            (self.is_deepspeed_enabled, "DeepSpeed"),
            (self.is_fsdp_enabled, "FSDP"),
            (self.accelerator.scaler is not None, "the fp16 gradient scaler"),
            (self.is_model_parallel, "a model distributed over devices (device_map)"),
        ):
            if refused:
                raise UserError(
                    f"{what} cannot be used: zo2ext streams the weights itself, to one device"
                )
        chunk_loss(self.model)
        for callback in (PrinterCallback, ProgressCallback):  # a notebook's stays
            self.remove_callback(callback)
        self.add_callback(self._progress())

    def _progress(self) -> ProgressReport:
        return ProgressReport(self)

    @property
    def rates(self) -> str:
        """Throughput and memory as text; empty before the first step."""
        return "" if self._meter is None else str(self._meter)

    # -- other ranks

    @cached_property
    def _parallel(self) -> Parallel | None:
        engine = self._caller_engine
        return self.args.parallel() if engine is None else engine.parallel

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.world_size > 1:  # without DDP
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self._parallel is not None:
            self._batches = distribute(loader, self._parallel, self.accelerator.num_processes)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._parallel is None or self.engine is None:
            return samples, items
        step, accumulation = self.state.global_step, self.args.gradient_accumulation_steps
        mine = weighted_batches(step, self._batches, len(samples), accumulation, self._parallel)
        self._weighted = mine
        if items is None or self.engine.steps < self._recorded_until:
            return samples, items
        own = self._get_num_items_in_batch(samples[:mine], device) if mine else 0
        found, mesh = self.engine.gather(float(own)), self._parallel.mesh
        joined = sum(found[mesh.sharing(d)[0]] for d in range(mesh.data))
        return samples, torch.full_like(items, joined)

    def get_total_train_batch_size(self, args: Any) -> int:
        each: int = super().get_total_train_batch_size(args)
        return each * int(self.args.data_ranks) // int(self.args.world_size)

    # -- where the weights are

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Do nothing: weights stay on the host and are streamed."""

    def _open(self, *, train: bool) -> ZOEngine:
        if self.engine is None:
            self.engine = self._caller_engine
        if self.engine is None:
            if self.args.simulate and self.args.device.type != "cpu":
                raise UserError(
                    f"simulate=True computes on the CPU, but args.device is {self.args.device}; "
                    "set use_cpu=True"
                )
            config = self._continued(self.args.zo_config(self.args.device))
            parallel = self._parallel if train else None
            engine = offload(self.model, config, train=train, parallel=parallel)
            engine.resume(steps=self._steps, skipped=self._skipped)
            self.engine = engine
        return self.engine

    def _continued(self, config: ZOConfig) -> ZOConfig:
        """Return `config` with the number of directions of the run that continues, if it does."""
        if config.directions == "auto" and self._resumed is not None:
            return config.replace(directions=RunState.load(self._resumed).config["directions"])
        if self.args.overwrite_output_dir:
            return config
        return with_directions_of(config, Path(self.args.output_dir) / JOURNAL_FILE)

    def _close(self) -> None:
        if self.engine is not None:
            self._steps, self._skipped = self.engine.steps, self.engine.skipped
            if self._caller_engine is None:
                self.engine.close()
            self.engine = self._begun = None

    @contextmanager
    def _offloaded(self, *, train: bool) -> Iterator[ZOEngine]:
        if self.engine is not None:
            yield self.engine
            return
        try:
            yield self._open(train=train)
        finally:
            self._close()

    # -- training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with reporting_errors(self._parallel):
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and self.args.overwrite_output_dir:
            raise UserError(
                "overwrite_output_dir=True begins a new run and resume_from_checkpoint continues "
                "one: use one of them"
            )
        if hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise UserError("train_dataset is empty: there is nothing to train on")
        self._micro_batches.clear()
        self._resumed = None
        if self.model_init is not None:  # a new model follows
            self._steps = self._skipped = 0
        try:
            output = super().train(self._start(resume_from_checkpoint), *args, **kwargs)
            return output._replace(training_loss=output.metrics["train_loss"])
        except BaseException as error:
            if self.engine is not None:
                self.engine.fail(error)
            raise
        finally:
            self._close()

    def _start(self, asked: str | bool | None) -> str | bool | None:
        """Return the checkpoint to begin at; None if the journal alone gives the same bits.

        That is so where the data draws random numbers: a Trainer's checkpoint has their state after
        batches that were made ahead.
        """
        chosen, out = self._complete(asked), Path(self.args.output_dir)
        folder = last_complete(out) if chosen is True else Path(chosen) if chosen else None
        if folder is None or not (folder / STATE_FILE).is_file():
            return chosen
        state = RunState.load(folder)
        if not state.random_data:
            return chosen
        here = folder.resolve().parent == out.resolve() and not self._steps
        if here and state.journal_file == JOURNAL_FILE and self._is_start_of(out / JOURNAL_FILE):
            logger.warning(
                f"the data draws random numbers, which {folder} cannot restore; this run continues "
                f"from {out / JOURNAL_FILE}"
            )
            return None
        logger.warning(
            f"the data draws random numbers, which {folder} cannot restore: batches from here on "
            "differ from those of the run that was stopped"
        )
        return chosen

    def _is_start_of(self, journal: Path) -> bool:
        """Return whether there is a journal that starts from the model's weights."""
        if not journal.is_file():
            return False
        with self._offloaded(train=False) as engine:
            start = read_journal(journal).header.get("fingerprint")
            return start == engine.description.get("fingerprint")

    def _complete(self, asked: str | bool | None) -> str | bool | None:
        """Return the checkpoint to begin at: `asked`, unless it was not saved completely."""
        out = Path(self.args.output_dir)
        if not asked or (
            asked is not True
            and (is_complete(Path(asked)) or Path(asked).resolve().parent != out.resolve())
        ):
            return asked
        last = last_complete(out)
        if last is None and not (out / JOURNAL_FILE).is_file():
            return asked
        if asked is not True or last is None:
            logger.warning(
                f"{out if asked is True else asked} is not a complete checkpoint; "
                f"this run continues from {last or out / JOURNAL_FILE}"
            )
        return str(last) if last else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise UserError(
                f"{type(self.model).__name__} has nothing to train: all of its "
                f"{sum(1 for _ in self.model.parameters())} parameters are frozen"
                + _adapters(self.model)
            )
        check_loss(getattr(self, "loss", None), self.model)
        curve = self._find_rate() if self.args.learning_rate == FIND else None
        engine = self._open(train=True)
        if self.args.learning_rate is None:
            self.args.learning_rate = engine.config.lr
            logger.warning(
                f"learning_rate is {engine.config.lr:.3g}, the default for {engine.trainable:,} "
                "trained weights"
            )
        if self._begun is not engine:
            self._begin(engine, curve)
            self._begun = engine
        self.optimizer: Any = ZOOptimizer(trainable, self.args.learning_rate)
        return self.optimizer

    def _journal(self, steps: int) -> Path:
        """Return the journal of the run that begins or continues after `steps` steps."""
        # A second train() of one trainer is another run, from the current weights.
        name = f"journal-{steps}.zo2" if steps else JOURNAL_FILE
        if self._resumed is not None:
            name = RunState.load(self._resumed).journal_file
        return Path(self._get_output_dir(getattr(self, "_trial", None))) / name

    def _find_rate(self) -> RateCurve | None:
        """Replace ``learning_rate="auto"`` by the run's recorded rate, or by one found now."""
        if self._caller_engine is not None:
            raise UserError(
                "learning_rate='auto' cannot be used with an engine of yours, whose weights cannot "
                "be put back: pass a number, or use zo2ext train --lr auto, which finds one for a "
                "model of any size"
            )
        process, path = self._parallel or SingleProcess(), self._journal(self._steps)
        recorded = None
        if process.rank == 0 and path.is_file() and not self.args.overwrite_output_dir:
            recorded = read_journal(path).header["run"].get("learning_rate")
        recorded = process.agree(recorded)
        if recorded is not None:
            self.args.learning_rate = recorded
            return None
        curve = search(
            self._continued(self.args.zo_config(self.args.device)), partial(rehearsal, self)
        )
        self.args.learning_rate, self.args.directions = curve.lr, curve.directions
        logger.warning(f"learning_rate is {curve.lr:.3g}, found in {len(curve.rates)} steps")
        return curve

    def _begin(self, engine: ZOEngine, curve: RateCurve | None) -> None:
        """Continue the run of the checkpoint and the journal, or begin one."""
        path, checksum = self._journal(engine.steps), None
        if self._resumed is not None:
            state = RunState.load(self._resumed)
            state.resume(engine, self._resumed)
            checksum = state.journal
        if self.args.overwrite_output_dir and engine.is_coordinator:
            kept = set_aside(path)
            if kept is not None:
                logger.warning(f"a new run begins; the journal of the former one is {kept}")
        run = describe_run(self.args, self.train_dataset, self._functions()) | described(curve)
        recorded = engine.keep_journal(path, run=run, checksum=checksum, step_by_step=True)
        self._recorded_until = engine.steps + recorded
        self._journal_path = path
        step = self._recorded_until + TIMELINE_STEP if engine.is_coordinator else -1
        self._timeline = StepTimeline(engine, path.parent, step=step)
        self._meter = Meter(engine)
        self._logged = self._began = (engine.steps, engine.skipped)
        if engine.is_coordinator:
            self._log = RunLog(path.parent, engine, self._meter, start=self._recorded_until)
            settings = {"steps": self.state.max_steps, **run, **engine.config.words()}
            write_atomically(path.parent / ARGUMENTS_FILE, json.dumps(settings, indent=2).encode())
            if curve is not None and plots.available():
                curve.save(path.parent / RATE_PICTURE)
        if recorded and (unknown := not_compared(run)):
            logger.warning(f"{path}: {' and '.join(unknown)} cannot be compared with this run's")
        finished = recorded >= self.state.max_steps - self.state.global_step
        if (recorded or finished) and engine.is_coordinator:
            logger.warning(
                f"{path} has {recorded} more steps, whose losses are not computed again"
                + (". This run is finished: nothing is left to do" if finished else "")
            )

    def _functions(self) -> dict[str, Any]:
        """Return the functions that make this run's batches and losses, by name."""
        own = {name: getattr(type(self), name) for name in ("compute_loss", "get_train_dataloader")}
        return {
            "data_collator": self.data_collator,
            "compute_loss_func": self.compute_loss_func,
            **{n: f for n, f in own.items() if not f.__module__.startswith(_KNOWN)},
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # Trainer would make one more step
            self.control.should_training_stop = True
        else:
            self._random_data.forget()
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Collect a micro-batch; with the last of a step, make the step."""
        self._random_data.look()
        inputs = self._prepare_inputs(inputs)
        scaled = self._is_scaled(num_items_in_batch)
        if self._weighted is None or len(self._micro_batches) < self._weighted:
            loss = self._loss_of(model, inputs, num_items_in_batch)
            # Reading labels waits for a GPU, and matters only where losses are means.
            weighted = scaled or _has_labels(inputs)
            self._micro_batches.append(_MicroBatch(loss, self._tokens(inputs), weighted))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        tokens = sum(m.tokens for m in self._micro_batches) * self.args.data_ranks
        losses = [m.loss for m in self._micro_batches]
        # Losses that are means are averaged; a mean over no label has weight 0.
        weights = None if scaled else [float(m.weighted) for m in self._micro_batches]
        self._micro_batches.clear()
        mean = self._make_step(model, losses, weights, tokens, total=scaled)
        self._total_train_tokens = self._total_train_tokens  # this step's are complete
        self._random_data.forget()
        self._random_data.look()
        return mean

    def _make_step(
        self,
        model: nn.Module,
        losses: Sequence[Callable[[], Any]],
        weights: Sequence[float] | None,
        tokens: int,
        *,
        total: bool = False,
    ) -> Tensor:
        """Make one step of the engine; see `ZOEngine.step`."""
        engine, meter = self.engine, self._meter
        assert engine is not None
        self._set_mode(model)
        if self._rehearsed is not None:
            with self._randomness(engine):
                mean = engine.step(losses, lr=self._rehearsed, weights=weights, total=total)
            return torch.tensor(mean)
        lr = float(self.optimizer.param_groups[0]["lr"])
        if engine.steps < self._recorded_until:
            mean = engine.step(losses, lr=lr, weights=weights, total=total)
            self._check_recorded(engine, lr)
        else:
            assert meter is not None
            with self._timeline.watch(), meter.measure(tokens), self._randomness(engine):
                mean = engine.step(losses, lr=lr, weights=weights, total=total)
            if self._log is not None:
                self._log.step()
        return torch.tensor(mean, device=self.args.device)

    @contextmanager
    def _randomness(self, engine: ZOEngine) -> Iterator[None]:
        """Draw random numbers of losses from a generator per step, and leave torch's as it was.

        So the data's random numbers do not depend on whether a step is computed or recorded.
        """
        cuda = [engine.device] if engine.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(direction_key(self.args.seed, engine.steps, engine.config.count))
            yield

    def _check_recorded(self, engine: ZOEngine, lr: float) -> None:
        assert engine.last is not None
        if engine.last.lr != lr:
            raise JournalError(
                f"{self._journal_path} is the journal of another run: the learning rate of step "
                f"{engine.last.step} was {engine.last.lr} and is {lr}. Use the first schedule, or "
                "another output_dir"
            )

    def _loss_of(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Callable[[], Any]:
        micro_batch = object()

        def loss() -> Any:
            with self.compute_loss_context_manager(), computing_loss(micro_batch):
                # compute_loss removes keys from its inputs, so each call gets a copy.
                try:
                    return self.compute_loss(
                        model, {**inputs}, num_items_in_batch=num_items_in_batch
                    )
                except Exception as error:
                    error.add_note(describe_batch(inputs, model))
                    raise

        return loss

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Return whether the step's loss is the sum of its losses, as ``Trainer`` decides it."""
        decided: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if decided is not None:
            return decided
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _set_mode(self, model: nn.Module) -> None:
        model.eval()
        # Of the root module only: TRL's trainers read it to log metrics under "train".
        model.training = isinstance(getattr(self, "_metrics", None), dict)

    def _tokens(self, inputs: dict[str, Any]) -> int:
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return main.numel() if isinstance(main, Tensor) else 0

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: there is no gradient."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return None; ``zo/projected_grad`` is logged instead."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        forward = super().floating_point_ops(inputs) // 3  # without the backward pass
        assert self.engine is not None
        passes = self.engine.config.forwards / (self.args.world_size / self.args.data_ranks)
        return int(passes * forward)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        engine = self.engine
        if "loss" in logs and engine is not None and engine.last and self._meter is not None:
            logs.update(self._meter.metrics())
            self._logged = self._nan_if_skipped(logs, "loss", self._logged)
        if "train_loss" in logs and engine is not None:
            self._nan_if_skipped(logs, "train_loss", self._began)
        super().log(logs, start_time)

    def _nan_if_skipped(
        self, logs: dict[str, float], name: str, since: tuple[int, int]
    ) -> tuple[int, int]:
        """Make a mean loss NaN if no step since then has a finite one; the Trainer shows 0."""
        assert self.engine is not None
        now = self.engine.steps, self.engine.skipped
        if now[0] - since[0] == now[1] - since[1] > 0:
            logs[name] = float("nan")
        return now

    # -- evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._random_data.forget()
        with self._offloaded(train=False):
            output = super().evaluation_loop(*args, **kwargs)
        numbers = {
            name: value
            for name, value in output.metrics.items()
            if isinstance(value, (int, float)) and not name.endswith("_time")
        }
        if self._log is not None and self.engine is not None:
            self._log.evaluations(self.engine.steps, numbers)
        return output

    # -- checkpoints

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # The weights of a caller's engine may not fit memory, or be shared by ranks.
        if self._caller_engine is None or self.engine is None or state_dict is not None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        halves = folder.with_name(folder.name + ".saving")
        self.engine.save_pretrained(halves, tokenizer=self.processing_class)
        if self.engine.is_coordinator:
            folder.mkdir(parents=True, exist_ok=True)
            for path in halves.iterdir():
                path.replace(folder / path.name)
            halves.rmdir()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.engine is not None
        best, step = self.state.best_global_step, self.state.global_step
        out = Path(self._get_output_dir(trial)) / PREFIX_CHECKPOINT_DIR
        folder, engine = out.with_name(f"{out.name}-{step}"), self.engine
        there = engine.is_coordinator and is_saved(folder, engine.journal_checksum())
        if engine.agree(there):  # saved by this run before it was stopped
            if best and (path := out.with_name(f"{out.name}-{best}")).is_dir():
                self.state.best_model_checkpoint = str(path)
            return
        # This file is written last and marks a complete checkpoint.
        if engine.is_coordinator:
            (folder / TRAINER_STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        engine.agree(None)  # no rank continues before it is complete

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.engine is not None and self.engine.is_coordinator:
            state = RunState.of(self.engine, self.model, random_data=self._random_data.seen)
            state.save(Path(output_dir), self.engine.exact_weights())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        state = RunState.load(folder)
        state.check_model(self.model, folder)
        engine = self._caller_engine
        config = self.args.zo_config() if engine is None else engine.config
        for difference in state.differences(config):
            logger.warning(f"This run does not continue that of {folder}: {difference}.")
        if engine is None:  # a caller's engine has the checkpoint's weights already
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed = folder


def _has_labels(inputs: dict[str, Any]) -> bool:
    """Return False if all labels of `inputs` are -100, so that the loss is a mean over nothing."""
    labels = inputs.get("labels")
    return not isinstance(labels, Tensor) or bool(labels.ne(-100).any())


def _adapters(model: nn.Module) -> str:
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return "; call requires_grad_(True) on those to train"
    return f" (adapters: {', '.join(adapters)}); load an adapter with is_trainable=True"


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``Trainer`` with zeroth-order steps. Its ``args`` are `ZOTrainingArguments`."""

    arguments_class = ZOTrainingArguments

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.train_dataset, Mapping):
            raise UserError(
                f"train_dataset has splits ({', '.join(map(str, self.train_dataset))}); expected "
                "one data set: pass one of them, such as data['train']"
            )
        return super()._train(*args, **kwargs)
