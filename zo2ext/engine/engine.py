"""A zeroth-order run of a model: its steps, journal, ranks and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from zo2ext import ops
from zo2ext._random_state import RandomState
from zo2ext._version import __version__
from zo2ext.config import FIND, ZOConfig
from zo2ext.engine.forward_passes import ForwardPasses, check_weights
from zo2ext.engine.history import History
from zo2ext.engine.host_weights import Sources
from zo2ext.engine.out_of_memory import explain_out_of_memory
from zo2ext.engine.stored_model import StoredModel
from zo2ext.engine.update_rule import Guard, StepRecord, decide, step_keys
from zo2ext.engine.watch import RunWatch
from zo2ext.errors import UserError
from zo2ext.journal.journal import Journal
from zo2ext.journal.records import Content, StepResult
from zo2ext.parallel.mesh import RankLosses, combine, perturbations
from zo2ext.parallel.parallel import Parallel, SingleProcess
from zo2ext.planning.directions import with_directions
from zo2ext.streaming.devices.device import Device
from zo2ext.streaming.stores.host_group import HostRanks
from zo2ext.streaming.stores.planes import check_planes, put_planes
from zo2ext.streaming.stores.rounding import RoundingError

# See docs/contracts.md. A run with dense directions alone has the noise of version 1.
NOISE_VERSION, FACTORED_NOISE_VERSION = 1, 2


class ZOEngine(StoredModel):
    """A model whose weights are in a host store and are trained by forward passes alone.

    Create it with `offload` or `load`. Between steps the model can be used as usual: calling it,
    ``generate``, ``state_dict`` and ``save_pretrained`` see current weights, streamed through the
    same device memory. Its parameters themselves (``model.parameters()``) are placeholders full of
    NaN until the engine is closed.

    An exception during a step, a KeyboardInterrupt too, leaves the run as it was before the step;
    among several ranks it ends the run on all of them. Engines are not thread-safe.

    Attributes:
        config: Settings of the run.
        layouts: Layouts of the model's units.
        parallel: This process among several; None for a single process.
        last: Record of the last step; None before the first.
        skipped: Number of steps skipped so far, mostly because a loss was not finite.
        clipped: Number of steps shortened so far; see ``clip``.
        equal: Number of steps so far whose losses were all equal.

    Example:
        >>> with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6)) as zo:
        ...     for batch in batches:
        ...         loss = zo.step(lambda: model(**batch).loss)
        ...     zo.save_pretrained("tuned", tokenizer=tokenizer)
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
        process = parallel or SingleProcess()
        process.mesh.check(config)
        config = with_directions(model, config, device if train else None)
        self._forwards = process.mesh.forwards(process.rank, config)
        super().__init__(
            model,
            config,
            device,
            train=train,
            sources=sources,
            host_ranks=lambda: ranks or process.host_ranks(device.torch_device),
            forwards=len(self._forwards),
        )
        self.parallel = parallel
        self.last: StepRecord | None = None
        self.skipped = self.clipped = self.equal = 0
        self._guard = Guard(config.clip)
        self._replaced = False
        self._passes = ForwardPasses(
            model,
            self._hooks,
            self._loader,
            self._pipeline,
            self.device,
            collective=self._weights.store.collective,
        )
        with self._undo:
            # Last, because `Parallel.reporting_errors` reports what fails before.
            self._team = process.team()
            self._undo.pop_all()
        self._history = History(self._team, self._loader.pending, self._header, self._adopt_period)
        self._watch = RunWatch(model)
        self._loader.before_write_back = self._history.settle

    # -- training

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return self._loader.pending.step

    def step(
        self,
        loss: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        lr: float | None = None,
        weights: Sequence[float] | None = None,
        total: bool = False,
    ) -> float:
        """Run forward passes along each direction, and update the weights.

        Args:
            loss: Computes the loss to minimize, a scalar tensor or a number, by calling the model
                on one batch. It is called once for each forward pass, `config.forwards` times, all
                in lockstep and from the same random state; in the first step it is called more
                often, to see what passes leave behind. A sequence has one function per micro-batch;
                their losses are summed, and all calls share one load of each unit. A data rank
                among several may have none, except with ``store="shared"``.
            lr: Learning rate of this step; the config's if None. All ranks must pass the same.
                Tolerant ranks that do not are warned about, and rank 0's is used.
            weights: Weights of the micro-batches, such as token counts; the loss is then their
                weighted mean over all data ranks. A micro-batch of weight 0 is not run. If all
                weights on all ranks are 0, the step is skipped and its loss is NaN.
            total: Sum the losses of all data ranks instead of averaging them, without `weights`.

        Returns:
            The mean of all losses; `last` has them one by one. On a GPU, waiting for the losses is
            the step's only synchronization. The update is applied to each unit when it is next
            loaded.

        Raises:
            UserError: `lr` is not a finite number >= 0, `loss` is empty or did not return a scalar,
                or the number of `weights` is wrong or one is not a finite number >= 0.
            RankFailure: Another rank cannot continue, or not with this one.
            OutOfDeviceMemory: The message lists what needs how much and which setting to lower.
            OSError: The journal cannot be written.

        Source:
            Malladi et al. 2023, arXiv:2305.17333, Algorithm 1 (MeZO); docs/contracts.md, "Update".
        """
        self._check_usable()
        self._check_trainable()
        if self._replaced:
            raise RuntimeError(
                "weights were replaced by load_state_dict, which the journal cannot describe; to "
                "train on from them, offload the model again, with another journal"
            )
        self._shared.clear()
        recorded = self._history.next_recorded()
        if recorded is not None:
            return self._apply(recorded)
        rate = self.config.lr if lr is None else lr
        if rate == FIND:
            raise UserError(
                "lr is 'auto', which zo2ext train and the trainers replace by a number before a "
                "run; here, pass config.replace(lr=zo2ext.find_lr(model, config, loss).lr)"
            )
        assert isinstance(rate, (int, float)), "the engine's config has a learning rate"
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(f"lr must be a finite number >= 0, got {rate!r}")
        closures = [loss] if callable(loss) else list(loss)
        if not closures and self._team.mesh.data == 1:
            raise UserError("loss must be a function or several, got an empty sequence")
        if not closures and self._weights.store.collective:
            raise UserError(
                "loss must be a function or several with store='shared', where all ranks visit "
                "every unit, got an empty sequence; give one of weight 0"
            )
        weights = check_weights(weights, len(closures))
        self._watch.before_step()
        step = self.steps
        self._team.begin_step(step, self.device)
        before = RandomState.current(self.device, host=True)
        try:
            return self._compute_step(closures, rate, weights, total, before)
        except BaseException as error:
            try:
                self._loader.recover()
            finally:
                if self.steps == step:
                    before.restore()
                self._team.fail(step, error)
            raise

    def _compute_step(
        self,
        closures: list[Callable[[], Any]],
        lr: float,
        weights: tuple[float, ...] | None,
        total: bool,
        before: RandomState,
    ) -> float:
        config, step, team = self.config, self.steps, self._team
        with explain_out_of_memory(self._model, self.layouts, config):
            perturbed = perturbations(self._forwards, step_keys(config, step), config)
            values = self._passes.run(closures, weights, perturbed)
            self._loader.finish_step()
            self._pipeline.end_step()
        losses = RankLosses(values, weights, total and weights is None)
        reports = team.report(step, losses, random_state=before, lr=lr)
        if reports is None:  # rank 0 has all of them, and decides
            return self._apply(team.receive(step))
        combined = combine(team.mesh, reports.losses, config, reports.data_ranks)
        mask = sum(1 << d for d in reports.data_ranks)
        result = decide(config, step, combined, lr, mask, self._guard)
        with self._history.recorded(result) as records:
            team.publish(result, records)
            return self._apply(result)

    def _apply(self, result: StepResult) -> float:
        """Make a step's update pending, and return its loss."""
        record = StepRecord.of(result, self.config.eps)
        if result.written_back:
            self._loader.pending.add_write_back(result.step)
        self._loader.pending.append(result.updates)
        self._watch.after_step(record, journal=self.journal is not None)
        self._guard.add(record)
        self.skipped += record.skipped
        self.clipped += record.clipped
        self.equal += record.equal
        self.last = record
        return record.loss

    def slope_sizes(self) -> list[float]:
        """Return the sizes of the slopes in the last steps, which `clip` judges the next one by."""
        return list(self._guard.sizes)

    # -- other ranks

    @property
    def is_coordinator(self) -> bool:
        """Whether this process is rank 0 or alone: it keeps the journal and writes the files."""
        return self._team.is_coordinator

    def agree(self, value: Any) -> Any:
        """Return rank 0's `value`, a JSON value, on all ranks; all of them must call this.

        Raises:
            RankFailure: Rank 0 does not.
        """
        self._history.join_ranks()
        return json.loads(self._team.broadcast(json.dumps(value).encode()))

    def gather(self, value: float) -> list[float]:
        """Return every rank's `value`, by rank; all of them must call this.

        Raises:
            RankFailure: A rank does not.
        """
        self._history.join_ranks()
        return self._team.gather(value)

    def fail(self, error: BaseException) -> None:
        """Report to the other ranks that this one ends with `error`, so that they do not wait."""
        self._team.fail(self.steps, error)

    # -- the journal

    @property
    def journal(self) -> Journal | None:
        """The journal; None if there is none, or another rank keeps it."""
        return self._history.journal

    def keep_journal(
        self,
        path: str | Path,
        *,
        run: Mapping[str, Any] | None = None,
        checksum: int | None = None,
        step_by_step: bool = False,
    ) -> int:
        """Record every step from now on, and apply the steps that the journal already has.

        Args:
            path: The journal's file. An existing one must belong to this run, that is have the same
                starting weights, config and `run`, and contain at least `steps` steps.
            run: What else identifies the run, as JSON values, such as the data and the origin of
                the starting weights.
            checksum: `journal_checksum()` of a checkpoint that the weights come from; None if they
                are the journal's starting weights.
            step_by_step: Apply one recorded step per call of `step`, which then computes no loss,
                instead of all of them now. For loops that count steps.

        Returns:
            The number of recorded steps that were or will be applied.

        Raises:
            JournalError: The journal is damaged, belongs to another run, or is in use.
            OSError: It cannot be written.
        """
        self._check_usable()
        recorded = self._history.open(
            Path(path), run or {}, checksum=checksum, sync_every=self.config.journal_sync
        )
        if not step_by_step:
            self._catch_up()
        return recorded

    def journal_checksum(self) -> int | None:
        """Return the journal's checksum after `steps` steps, for `keep_journal`; None without."""
        return None if self._replaced else self._history.checksum()

    def replay(self, content: Content, *, until: int) -> None:
        """Apply a journal's steps from `steps` up to step `until`, without recording them.

        Every unit passes through the device once, whatever the number of steps.

        Raises:
            JournalError: The journal does not contain these steps.
        """
        self._check_usable()
        self._history.replay(content, until)
        self._catch_up()

    def _catch_up(self) -> None:
        for result in self._history.all_recorded():
            self._apply(result)
        self._hooks.close_reads()
        self._loader.catch_up()

    def _header(self, run: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "zo2ext": __version__,
            **self._noise(),
            "config": self.config.defining(),
            "run": dict(run),
            "start": self.steps,
            **self._description,
        }

    def _noise(self) -> dict[str, Any]:
        """Return the version of the noise and, if there are any, the ids of factored tensors."""
        if self.config.rank is None:
            return {"noise": NOISE_VERSION}
        parts = [part for layout in self.layouts for part in layout.parts if part.factors]
        ids = sorted(placed.spec.id for part in parts for placed in part.tensors)
        return {"noise": FACTORED_NOISE_VERSION, "factored": ids}

    def _adopt_period(self, write_back: int | str) -> None:
        """Use the run's write-back period instead of one that ``"auto"`` chose here."""
        if self._chosen_period:
            self.config = self.config.replace(write_back=write_back)
            self._loader.pending.period = self.config.write_back_period

    # -- weights

    def resume(
        self,
        *,
        steps: int,
        skipped: int = 0,
        clipped: int = 0,
        equal: int = 0,
        slope_sizes: Sequence[float] = (),
        exact_weights: Mapping[str, Tensor] | None = None,
        pending: Sequence[tuple[ops.Update, ...]] = (),
        write_back: int | str | None = None,
    ) -> None:
        """Continue a run from a checkpoint that the model was loaded from.

        With the run's config, the following steps have the bits of a run that never stopped.

        Args:
            steps: `steps` of the checkpoint.
            skipped, clipped, equal: Those of the checkpoint.
            slope_sizes: `slope_sizes()` of the checkpoint.
            exact_weights: What `exact_weights()` returned; None if the model holds exact weights.
            pending: What `pending()` returned.
            write_back: `config.write_back` of the run, used if this config's is ``"auto"``.

        Raises:
            ValueError: `exact_weights` does not have the names, shapes and dtypes that
                `exact_weights()` returns, a scale in it is not finite, or a number is impossible.
        """
        if not 0 <= skipped <= steps:
            raise UserError(f"0 <= skipped <= steps must hold, got {skipped} and {steps}")
        if len(pending) > steps:
            raise UserError(f"pending must hold at most {steps} steps, got {len(pending)}")
        self._check_usable()
        self._hooks.close_reads()
        inexact = self._weights.inexact(pending=bool(pending))
        if exact_weights is not None or pending:
            check_planes(inexact, exact_weights or {})
        self._loader.settle()
        if exact_weights is not None:
            put_planes(self._weights.store, inexact, exact_weights)
            for layout, _ in inexact:
                self._loader.host_was_written(layout.unit)
        self._shared.clear()
        if write_back is not None:
            self._adopt_period(write_back)
        self._loader.restart(steps - len(pending), pending)
        self.skipped, self.clipped, self.equal = skipped, clipped, equal
        self._guard = Guard(self.config.clip, slope_sizes)
        self.last, self._replaced = None, False

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        max_shard_size: int | str = "50GB",
        dtype: torch.dtype | None = None,
    ) -> RoundingError:
        """Save the model as an ordinary transformers checkpoint, one unit at a time.

        Names and bytes are those of ``model.save_pretrained``, which may need memory for all
        weights at once; a quantized model needs it here as well. The folder appears, or replaces an
        existing one, atomically. Its model card describes how the weights were trained. All ranks
        must call this; rank 0 writes.

        Args:
            folder: Where to save.
            tokenizer: Saved beside the weights.
            max_shard_size: Maximum size of a weight file, as in transformers.
            dtype: Dtype of the saved floating-point weights, rounded to nearest; None keeps it.

        Returns:
            The error of rounding to `dtype`.

        Raises:
            TypeError: The model is not a transformers model, or transformers cannot save it.
            OSError: The folder cannot be written; its former content is still there.
        """
        from zo2ext.checkpoints.model_card import model_card
        from zo2ext.checkpoints.write import read_checkpoint_values, save_checkpoint

        self._check_usable()
        model, parameters = self._model, self._parameters_by_unit()
        if not self.is_coordinator:
            if self._weights.store.collective:  # reading takes all ranks of the host
                read_checkpoint_values(model, self._values, parameters)
            return RoundingError()
        return save_checkpoint(
            model,
            folder,
            self._values,
            parameters,
            quantized=self._quantized,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            dtype=dtype,
            card=model_card(
                model, self.config, self.layouts, steps=self.steps, trainable=self.trainable
            ),
        )

    def flush(self) -> None:
        """Write all pending updates back to the host's weights, and wait until they are there.

        With ``write_back=1`` no later bit changes. Otherwise weights are rounded earlier than the
        run would round them, which the journal records.
        """
        self._check_usable()
        self._hooks.close_reads()
        if not self._loader.flushing_is_free:
            self._history.record_write_back()
            self._loader.pending.add_write_back(self.steps)
        self._loader.flush()

    def close(self, *, keep_weights: bool = True) -> None:
        """Close the journal, and make the model an ordinary one on the CPU again.

        Its weights are those that ``state_dict()`` shows, with all updates, in the compute dtype.
        Closing again has no effect.

        Args:
            keep_weights: If False, parameters stay placeholders and the model becomes useless. For
                a model that is saved already and may be larger than memory.
        """
        if self._closed:
            return
        self._history.close()
        self._team.leave()
        self._give_back(keep_weights=keep_weights)

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

    @property
    def sent_nbytes(self) -> int:
        """Bytes that this rank has sent to agree on steps with others."""
        return self._team.sent

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._passes.running:
            raise RuntimeError("a step is running: the loss closure may only call the model")

    def _before_load(self) -> None:
        if self._history.ledger is not None:
            self._replaced = True
        self._history.close()
        super()._before_load()
