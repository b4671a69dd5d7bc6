"""One zeroth-order run of a model: the step, and what reads the weights between steps."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from zo2ext import ops
from zo2ext._random_state import RandomState
from zo2ext._version import __version__
from zo2ext.checkpoints.fingerprint import describe
from zo2ext.config import Store, ZOConfig, parse_size
from zo2ext.engine.history import History
from zo2ext.engine.hooks import Gate, ReadCheck
from zo2ext.engine.lockstep import Lockstep
from zo2ext.engine.losses import check_weights, float32_rows
from zo2ext.engine.offload import HostWeights, Sources, check_model, source_of
from zo2ext.engine.out_of_memory import explain_out_of_memory
from zo2ext.engine.state_dict import HostView
from zo2ext.engine.update_rule import StepRecord, decided, step_keys
from zo2ext.engine.write_back_period import measure
from zo2ext.errors import LateRead
from zo2ext.journal.journal import Journal
from zo2ext.journal.records import Content, StepResult
from zo2ext.model.compile import is_compiled, uncompiled
from zo2ext.model.layout import lay_out
from zo2ext.model.quantized import Target
from zo2ext.model.units import find_units
from zo2ext.parallel.agreement import Alone
from zo2ext.parallel.mesh import Mesh, RankLosses, combine, perturbations
from zo2ext.parallel.parallel import Parallel, own_device, reporting_errors
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.devices.select import make_device
from zo2ext.streaming.pipeline import Pipeline, Traffic, spread
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.planes import check_planes, named_planes, put_planes
from zo2ext.streaming.stores.rounding import RoundingError
from zo2ext.streaming.unit_loader import Loader, Perturbation

if TYPE_CHECKING:
    from zo2ext.checkpoints.compare import Difference

NOISE_VERSION = 1  # of docs/contracts.md

logger = logging.getLogger(__name__)


class ZOEngine:
    """A model whose weights rest on the host and are trained by forward passes alone.

    Made by `offload`. Between steps the model is an ordinary one: calling it, ``generate``,
    ``state_dict`` and ``save_pretrained`` see current weights, streamed through the same memory.
    Its parameters, looked at directly (``model.parameters()``), are placeholders full of NaN.

    Not safe to use from several threads at once.

    Attributes:
        config: Of the run.
        parallel: This process's place among several; None where it is alone.
        last: The record of the last step, None before the first.
        skipped: Steps skipped so far because a loss was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ZOConfig,
        device: Device,
        *,
        train: bool = True,
        sources: Sources | None = None,
        parallel: Parallel | None = None,
        ranks: HostRanks | None = None,
    ) -> None:
        self.config = config
        self.parallel = parallel
        mesh, rank = (Mesh(), 0) if parallel is None else (parallel.mesh, parallel.rank)
        mesh.check(config.directions)
        self._forwards = mesh.forwards(rank, config.directions)
        self.last: StepRecord | None = None
        self.skipped = 0
        self._model, self._device = model, device
        self._closed = self._stepping = self._checked = self._replaced = False
        check_model(model, device.torch_device)

        units, entries = find_units(model, config.granularity)
        self.layouts = tuple(lay_out(unit, config) for unit in units)
        if train:
            self._check_trainable()
        self._decides_period = config.write_back == "auto"
        if self._decides_period:
            self.config = config = self._with_period(device, config)
        targets = {id(t.parameter): t.targets for unit in units for t in unit.tensors}
        own = sources or {}
        self._description = describe(
            model, lambda parameter: [source_of(t, own) for t in targets[id(parameter)]]
        )
        if parallel is not None and config.store is Store.SHARED:
            ranks = parallel.host_ranks(device.torch_device)
        self._weights = HostWeights(model, self.layouts, device, config, sources or {}, ranks)
        store = self._weights.store
        try:
            with explain_out_of_memory(model, self.layouts, config):
                self._pipeline = Pipeline(
                    store, device, slots=config.slots, resident=self._residents()
                )
                self._loader = Loader(store, device, self._pipeline, config, len(self._forwards))
        except BaseException:
            if sources is None:
                self._weights.give_back(lambda layout, i: store.view(layout, layout.tensors[i]))
            else:
                self._weights.drop()
            raise
        self._gate = Gate(model, units, entries, self._loader, self._weights.placeholders)
        self._host_view = HostView(
            model, self._gate, self._host_tensor, self._before_load, self._replace_weights
        )
        self._shared = WeakValueDictionary[int, Tensor]()  # host copies that tied names share
        # Last: of what goes wrong before, `Parallel.reporting_errors` tells the others.
        self._team = Alone() if parallel is None else parallel.team()
        self._history = History(self._team, self._loader.pending, self._header, self._take_period)

    # -- training

    @property
    def steps(self) -> int:
        """Steps finished."""
        return self._loader.pending.step

    def step(
        self,
        loss: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        lr: float | None = None,
        weights: Sequence[float] | None = None,
        total: bool = False,
    ) -> float:
        """One step: forward passes at +eps and -eps along each direction, and their update.

        Args:
            loss: Computes the loss (any scalar to be minimised: a tensor or a number, with a
                gradient or without) by calling the model on one batch. Called twice a direction,
                all calls in step with each other, starting from the same random state. Several
                (one a micro-batch) are summed; all their calls share one load of each unit. A data
                rank among several may have none, but not with ``store="shared"``.
            lr: Of this step; the config's when None. All ranks must have the same. Tolerant ones
                that have not are warned of, and rank 0's counts.
            weights: Of each micro-batch, its tokens perhaps: the loss is then their weighted mean,
                over all data ranks. One of weight 0 is not run: the step has the bits that it has
                without it. Where all of all ranks are 0, the step is skipped, its loss NaN.
            total: Without `weights`, among data ranks: whether the loss is the sum over all of
                them, not their mean.

        Returns:
            The mean of all losses. `last` has the parts. On a GPU, waiting for the losses is the
            step's only wait; the update reaches the weights as they are next loaded.

        Raises:
            ValueError: `lr` is not a finite number >= 0, `loss` is empty or returned no scalar, or
                `weights` are not as many finite numbers >= 0.
            RankFailure: Another rank cannot go on, or not with this one.
            OutOfDeviceMemory: With what each part of the run takes, and which setting to lower.
            OSError: The journal cannot be written. The step is not made; all before it are safe.
        """
        self._check_open()
        self._check_trainable()
        if self._replaced:
            raise RuntimeError(
                "weights were replaced by load_state_dict, which the journal cannot describe; to "
                "train on from them, offload the model anew, with a journal of its own"
            )
        self._shared.clear()
        recorded = self._history.next_recorded()
        if recorded is not None:
            return self._finish(recorded)
        lr = self.config.lr if lr is None else lr
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
        parts = [loss] if callable(loss) else list(loss)
        if not parts and self._team.mesh.data == 1:
            raise ValueError("loss must be a function or several, got an empty sequence")
        if not parts and self.config.store is Store.SHARED:
            raise ValueError(
                "loss must be a function or several with store='shared', where all ranks visit "
                "every unit, got an empty sequence; give one of weight 0"
            )
        weights = check_weights(weights, len(parts))
        config, step = self.config, self.steps
        keys = step_keys(config, step)
        self._team.ready(step, self.device)
        before = RandomState.current(self.device)
        try:
            with explain_out_of_memory(self._model, self.layouts, config):
                losses = self._losses(
                    parts, weights, perturbations(self._forwards, keys, config.eps)
                )
                self._loader.finish_step()
                self._pipeline.end_step()
        except BaseException as error:
            self._team.fail(step, error)
            raise

        def decide(
            measured: Mapping[int, RankLosses], counted: list[int]
        ) -> tuple[StepResult, bytes]:
            all_losses = combine(self._team.mesh, measured, config.directions, counted)
            made = decided(config, step, all_losses, lr, sum(1 << d for d in counted))
            return made, self._history.record(made)

        measured = RankLosses(losses, weights, total and weights is None)
        used = before.used_since()
        made = self._team.settle(step, measured, random_state=used, lr=lr, decide=decide)
        return self._finish(made)

    def _finish(self, made: StepResult) -> float:
        """Hand a step's update on to the units, and the step to `last`."""
        if made.written_back:
            self._loader.pending.add_write_back(made.step)
        self._loader.pending.append(made.updates)
        self.skipped += made.skipped
        self.last = StepRecord.of(made, self.config.eps)
        return self.last.loss

    def _losses(
        self,
        parts: list[Callable[[], Any]],
        weights: tuple[float, ...] | None,
        perturbed: list[Perturbation],
    ) -> tuple[tuple[float, ...], ...]:
        """Losses of each of `parts` under each perturbation; float32 values.

        Of one that has weight 0, and is not run: zeros.
        """
        if weights is None:
            return self._run(parts, perturbed)
        counting = [part for part, weight in zip(parts, weights, strict=True) if weight]
        if not counting and self.config.store is Store.SHARED:
            self._run(parts[:1], perturbed)  # the host's other ranks gather units with this one
        losses = iter(self._run(counting, perturbed))
        nothing = (0.0,) * len(perturbed)
        return tuple(next(losses) if weight else nothing for weight in weights)

    def _run(
        self, parts: list[Callable[[], Any]], perturbed: list[Perturbation]
    ) -> tuple[tuple[float, ...], ...]:
        if not parts:
            return ()
        self._gate.close_reads()
        self._stepping = True
        try:
            with torch.no_grad():
                while True:
                    self._pipeline.begin_step()
                    lockstep = Lockstep(
                        self._loader, perturbed, self._gate.activate, self._gate.restore
                    )
                    try:
                        values = self._in_lockstep(lockstep, parts)
                    except LateRead as late:
                        logger.info("unit %s is read late; it is kept loaded", late.unit.name)
                        continue
                    if values is not None:
                        return float32_rows(values)
        finally:
            self._stepping = False

    def _in_lockstep(
        self, lockstep: Lockstep, parts: list[Callable[[], Any]]
    ) -> list[list[Any]] | None:
        """What `parts` return; None if that does not count and they are to run again."""
        where = self._device.torch_device
        if self._checked:
            return lockstep.run(parts, self._gate.kept, where)
        # Compiled code is not to be traced with a check in it: it would stay as slow. Uncompiled it
        # may come to other last bits, which are not the run's.
        compiled = is_compiled(self._model)
        before = RandomState.current(where)
        with ReadCheck(self._gate), uncompiled() if compiled else nullcontext():
            values = lockstep.run(parts, self._gate.kept, where)
        self._checked = True
        if not compiled:
            return values
        before.restore()
        return None

    # -- other ranks

    @property
    def is_coordinator(self) -> bool:
        """Whether this process is alone or rank 0, which keeps the journal and writes the files."""
        return self._team.is_coordinator

    def agree(self, value: Any) -> Any:
        """What rank 0 has as `value`, a JSON value. All ranks must come here.

        Raises:
            RankFailure: Rank 0 does not.
        """
        self._history.meet()
        return json.loads(self._team.share(json.dumps(value).encode()))

    def gather(self, value: float) -> list[float]:
        """What each rank has as `value`, by rank. All ranks must come here.

        Raises:
            RankFailure: One does not.
        """
        self._history.meet()
        return self._team.gather(value)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with `error`, so that they do not wait for it."""
        self._team.fail(self.steps, error)

    # -- the journal

    @property
    def journal(self) -> Journal | None:
        """Where steps are recorded; None where they are not, or by another rank."""
        return self._history.journal

    def keep_journal(
        self,
        path: str | Path,
        *,
        run: Mapping[str, Any] | None = None,
        checksum: int | None = None,
        step_by_step: bool = False,
    ) -> int:
        """Record every step from here on, and take up those that are recorded already.

        Args:
            path: The journal's file. One that is there must be of this very run: the same
                starting weights, config and `run`, and must reach up to `steps` at least.
            run: What else makes the run what it is, as JSON values: the data, say, and where the
                starting weights come from. A run with another `run` is another run.
            checksum: The journal's after `steps` steps, where the weights are not its starting
                ones but a checkpoint's (`ZOEngine.journal_checksum` when that was made).
            step_by_step: What is recorded is taken up by as many calls of `step`, which then
                compute no loss; for loops that have to count along. False: all at once, here.

        Returns:
            Steps that were taken up, or wait to be.

        Raises:
            JournalError: It is damaged, of another run, or another process has it.
            OSError: It cannot be written.
        """
        self._check_open()
        recorded = self._history.keep(
            Path(path), run or {}, checksum=checksum, sync_every=self.config.journal_sync
        )
        if not step_by_step:
            self._catch_up()
        return recorded

    def _take_period(self, content: Content) -> None:
        """Take a period that is decided on this machine from the run's records, if it has any."""
        if self._decides_period:
            self.config = self.config.replace(write_back=content.write_back)
            self._loader.pending.period = self.config.write_back_period

    def journal_checksum(self) -> int | None:
        """The journal's checksum after `steps` steps, for `keep_journal`; None without one."""
        return None if self._replaced else self._history.checksum()

    def _header(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "zo2ext": __version__,
            "noise": NOISE_VERSION,
            "config": self.config.defining(),
            "run": dict(run),
            "start": self.steps,
            **self._description,
        }

    def replay(self, content: Content, *, until: int) -> None:
        """Take up the steps of a journal from `steps` on, up to step `until`, recording nothing.

        Every unit passes through the device once, however many steps there are.

        Raises:
            JournalError: The journal does not reach from `steps` to `until`.
        """
        self._check_open()
        self._history.replay(content, until)
        self._catch_up()

    def _catch_up(self) -> None:
        """Apply what is recorded ahead, unit by unit, in one pass over each."""
        for recorded in self._history.all_recorded():
            self._finish(recorded)
        self._gate.close_reads()
        self._loader.catch_up()

    # -- weights

    def exact_weights(self) -> dict[str, Tensor]:
        """Stored weights that ``state_dict()`` does not have to the bit, by name.

        Those whose storage is finer than their compute dtype, which ``state_dict()`` rounds; and
        all, where updates are pending since the last write-back step, which it has applied. All
        planes of those whose format has several (see `exact_weights`, the module). The tensors
        themselves, not copies; to be used before the next step. With `pending`, what `resume` needs
        to continue to the same bits.
        """
        self._check_open()
        self._gate.close_reads()
        self._loader.catch_up()
        inexact = self._weights.inexact(bool(self.pending()))
        return named_planes(self._weights.store, inexact)

    def pending(self) -> list[tuple[ops.Update, ...]]:
        """The updates of each step since the last write-back step; empty where there are none."""
        return self._loader.pending.since_write_back()

    def resume(
        self,
        *,
        steps: int,
        skipped: int = 0,
        exact_weights: Mapping[str, Tensor] | None = None,
        pending: Sequence[tuple[ops.Update, ...]] = (),
    ) -> None:
        """Continue a run whose weights after `steps` steps the model holds.

        With the config of that run, what follows has the bits of a run that never stopped.

        Args:
            steps: What `steps` was.
            skipped: What `skipped` was.
            exact_weights: What `exact_weights()` was. None: what the model holds is exact.
            pending: What `pending()` was.

        Raises:
            ValueError: `exact_weights` does not have the names, shapes and dtypes that
                `exact_weights()` has, or a scale among them is not finite.
        """
        if not 0 <= skipped <= steps:
            raise ValueError(f"0 <= skipped <= steps must hold, got {skipped} and {steps}")
        if len(pending) > steps:
            raise ValueError(f"pending must hold at most {steps} steps, got {len(pending)}")
        self._check_open()
        self._gate.close_reads()
        inexact = self._weights.inexact(bool(pending))
        if exact_weights is not None or pending:
            check_planes(inexact, exact_weights or {})
        self._loader.settle()
        if exact_weights is not None:
            put_planes(self._weights.store, inexact, exact_weights)
            for layout, _ in inexact:
                self._loader.host_was_written(layout.unit)
        self._shared.clear()
        self._loader.restart(steps - len(pending), pending)
        self.skipped, self.last, self._replaced = skipped, None, False

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        max_shard_size: int | str = "50GB",
        dtype: torch.dtype | None = None,
    ) -> RoundingError:
        """Save the model as it is now, one unit at a time, as an ordinary transformers checkpoint.

        To be called by all ranks, where there are several; rank 0 writes.

        The same names and bytes as ``model.save_pretrained``, which holds all weights that are not
        at rest as they are read (packed, or between write-backs) in memory at once; so is a
        quantised model here. The folder appears, or replaces the one that was there, in one go. Its
        model card, README.md, says how the weights came about.

        Args:
            folder: Where to.
            tokenizer: Saved beside the weights.
            max_shard_size: Of one file of weights, as in transformers.
            dtype: Of the weights in the files, rounded to nearest; None: as the model sees them.

        Returns:
            What rounding to `dtype` did to the weights.

        Raises:
            TypeError: The model is not one of transformers.
            OSError: It cannot be written; what was in `folder` is still there.
        """
        from zo2ext.checkpoints.model_card import model_card
        from zo2ext.checkpoints.write import read_along, save_checkpoint

        self._check_open()
        if not self.is_coordinator:
            if self.config.store is Store.SHARED:  # reading takes all ranks of the host
                read_along(self._model, self._values, self._groups())
            return RoundingError()
        return save_checkpoint(
            self._model,
            folder,
            self._values,
            self._groups(),
            quantised=self._quantised,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            dtype=dtype,
            card=model_card(self._model, self),
        )

    def compare(self, folder: str | Path) -> list[Difference]:
        """How an ordinary transformers checkpoint differs from the model as it is now, in bits.

        Raises:
            TypeError: The model is quantised: its files hold more than its parameters.
            ValueError: `folder` has no weights as safetensors.
        """
        from zo2ext.checkpoints.compare import compare_checkpoint

        self._check_open()
        if self._quantised:
            raise TypeError("the model is quantised: what it saves cannot be compared in bits")
        return compare_checkpoint(self._model, folder, self._values, self._groups())

    @property
    def _quantised(self) -> bool:
        return any(t.components for layout in self.layouts for t in layout.unit.tensors)

    def _groups(self) -> list[list[nn.Parameter]]:
        return [[t.spec.parameter for t in layout.tensors] for layout in self.layouts]

    def _values(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Values of some parameters of one unit, with all updates, on the host."""
        self._gate.close_reads()
        if self._loader.flushing_is_free:
            return [self._host_tensor(parameter) for parameter in parameters]
        layout, _ = self._weights.place(parameters[0])
        read = self._loader.read(layout.unit)
        return [read[id(parameter)] for parameter in parameters]

    def flush(self) -> None:
        """Write all pending updates back to the host's weights, and wait until they are there.

        With ``write_back=1`` this changes no bit of what follows. Otherwise it rounds earlier than
        the run would have: an event of the run, which its journal records.
        """
        self._check_open()
        self._gate.close_reads()
        if not self._loader.flushing_is_free:
            self._history.record_write_back()
        self._flush()

    def _flush(self) -> None:
        if not self._loader.flushing_is_free:
            self._loader.pending.add_write_back(self.steps)
        self._loader.flush()

    def close(self, *, keep_weights: bool = True) -> None:
        """Finish: the model is an ordinary one on the CPU again, and the journal is closed.

        Its weights are those that ``state_dict()`` shows, with all updates, in the compute dtype.
        Closing again does nothing.

        Args:
            keep_weights: False leaves placeholders in their place, and makes the model useless:
                for one that is saved, or need not be, and may be larger than memory.
        """
        if self._closed:
            return
        self._history.close()
        self._team.leave()
        self._gate.close_reads()
        if keep_weights and self._loader.flushing_is_free:
            self._loader.flush()
        self._loader.settle()
        self._host_view.remove()
        self._gate.remove()
        self._shared.clear()
        if keep_weights:
            self._weights.give_back(self._loader.given_back)
        else:
            self._weights.drop()
        self._closed = True

    def __enter__(self) -> ZOEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    # -- numbers

    @property
    def device(self) -> torch.device:
        """Where inputs of the model belong."""
        return self._device.torch_device

    @property
    def description(self) -> dict[str, Any]:
        """Of the starting weights, as a journal's header has it; see `fingerprint.describe`."""
        return self._description

    @property
    def rounding_error(self) -> RoundingError:
        """What storing the starting weights did to those that were in another format."""
        return self._weights.rounding

    @property
    def traffic(self) -> Traffic:
        """Bytes uploaded and offloaded so far, and gathered from other ranks of the host."""
        return self._pipeline.traffic

    @property
    def sent_nbytes(self) -> int:
        """Bytes that this rank sent to agree on steps with others: losses and records."""
        return self._team.sent

    @property
    def trainable(self) -> int:
        """Weights that are trained, tied ones counted once."""
        parts = [part for layout in self.layouts for part in layout.parts]
        return sum(tensor.numel for part in parts for tensor in part.tensors)

    @property
    def host_nbytes(self) -> int:
        """Host bytes of the store: of the weights at rest, padding included, or staging memory."""
        return self._weights.store.host_nbytes

    @property
    def device_nbytes(self) -> int:
        """Device bytes of slots, resident units and perturbed copies; activations not counted."""
        return self._pipeline.device_nbytes + self._loader.compute_nbytes

    # --

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; call zo2ext.offload(model, config) again")
        if self._stepping:
            raise RuntimeError("a step is running: the loss closure may only call the model")

    def _check_trainable(self) -> None:
        if not any(layout.parts for layout in self.layouts):
            raise ValueError(
                "model has no trainable parameter: every requires_grad is False; "
                "set requires_grad_(True) on what is to be trained"
            )

    def _with_period(self, device: Device, config: ZOConfig) -> ZOConfig:
        if not any(layout.parts for layout in self.layouts):
            return config.replace(write_back=1)
        costs = measure(self.layouts, device, config)
        logger.info(
            "write_back='auto' is %d here: a write-back costs %.3g ns a weight, an update %.3g ns",
            *(costs.period, costs.write_back * 1e9, costs.update * 1e9),
        )
        return config.replace(write_back=costs.period)

    def _residents(self) -> frozenset[int]:
        sizes = [layout.nbytes for layout in self.layouts]
        resident = self.config.resident
        if isinstance(resident, str) and resident != "all":
            return spread(sizes, 0, budget=parse_size(resident))
        return spread(sizes, resident)

    def _host_tensor(self, target: Target) -> Tensor:
        layout, index = self._weights.place(target)
        if self._loader.flushing_is_free:
            self._loader.flush()
        return self._loader.host_tensor(layout, index, self._shared)

    def _before_load(self) -> None:
        if self._history.ledger is not None:
            self._replaced = True
        self._history.close()
        self._flush()

    def _replace_weights(self, target: Target, values: Tensor) -> None:
        layout, index = self._weights.place(target)
        self._shared.clear()
        self._weights.store.fill(layout, layout.tensors[index], values)
        self._loader.host_was_written(layout.unit)


def offload(
    model: nn.Module,
    config: ZOConfig | None = None,
    *,
    train: bool = True,
    journal: str | Path | None = None,
    parallel: Parallel | None = None,
) -> ZOEngine:
    """Take over `model`'s weights, to train it by forward passes alone.

    Args:
        model: Any ``nn.Module``; its forward runs unmodified. Parameters with
            ``requires_grad=False`` are uploaded but never perturbed, updated or written back.
        config: Of the run; the defaults when None.
        train: Whether something has to be trainable. False: the model is only to be read, by
            evaluation or ``generate``.
        journal: File to record the run in. If it is there already, the run continues where it
            ends: `ZOEngine.steps` says where that is. See `ZOEngine.keep_journal`.
        parallel: This process's place among several that train the model together.

    Returns:
        The engine; a context manager that closes itself. The model's weights move into its host
        store, one tensor at a time; `ZOEngine.close` makes the model an ordinary one again.

    Raises:
        TypeError: `model` is no module, or has trainable weights that cannot be perturbed.
        ValueError: It has no trainable parameter, meta tensors, or is offloaded already.
        OutOfDeviceMemory: The device cannot hold the slots.
        JournalError: The journal is damaged, of another run, or in use.
        RankFailure: Another rank did not come, or is of another run, model or build.
    """
    config = config or ZOConfig()
    with reporting_errors(parallel):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        device = make_device(own_device(config.device, parallel))
        engine = ZOEngine(model, config, device, train=train, parallel=parallel)
    if journal is not None:
        try:
            engine.keep_journal(journal)
        except BaseException:
            engine.close()
            raise
    return engine
