"""Several ordinary forward passes in lockstep: each unit is loaded once for all of them.

Every pass is a coroutine (a greenlet) that pauses when it needs weights that are not loaded. The
scheduler loads what the first of them waits for, gives each waiting coroutine its own copy in turn,
and runs it to its next pause. The model's code is unmodified; `hooks` makes a forward pass pause.
"""

from __future__ import annotations

import contextvars
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch

from zo2ext.engine.pass_state import PassState
from zo2ext.engine.thread_state import ThreadState
from zo2ext.model.units import Unit
from zo2ext.streaming.unit_loader import Loaded, Loader, Perturbation
from zo2ext.streaming.views import Binding

logger = logging.getLogger(__name__)

Closure = Callable[[], Any]


@dataclass(eq=False)
class Reader:
    """Code that reads weights, and the units that are open to it.

    A unit is open while a forward of an entry that needs it runs, or from a read outside of any
    such forward until the reader's next pause; a *kept* one is open from the reader's start on.
    """

    kept: list[Unit]
    running: Counter[Unit] = field(default_factory=Counter)
    read: set[Unit] = field(default_factory=set)

    def has(self, unit: Unit) -> bool:
        return unit in self.running or unit in self.read

    def open_units(self) -> set[Unit]:
        return self.read.union(self.running)

    def enter(self, units: Iterable[Unit]) -> None:
        self.running.update(units)

    def exit(self, units: Iterable[Unit]) -> None:
        for unit in units:
            count = self.running[unit]
            if count > 1:
                self.running[unit] = count - 1
                continue
            del self.running[unit]

    def drop_reads(self) -> None:
        self.read.intersection_update(self.kept)

    def close(self) -> None:
        self.running.clear()
        self.read.clear()


class Coroutine(Reader):
    """One forward pass, which pauses wherever it needs weights.

    It has its own `ThreadState` and context variables, restored when it resumes and saved when it
    pauses.
    """

    def __init__(self, index: int, closure: Closure, kept: list[Unit], home: ThreadState) -> None:
        super().__init__(kept)
        self.index = index  # number of the perturbed copy that it reads
        self.request: tuple[Unit, ...] = ()
        self.value: Any = None
        self.state = self._home = home
        self._closure, self._cancelled = closure, False
        self._greenlet = greenlet.greenlet(self._run)
        self._greenlet.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        return bool(self._greenlet.dead)

    def resume(self) -> None:
        """Run to the next pause or to the end. Called by the scheduler.

        Afterwards the thread is as before, except for random generators, which nothing else uses.
        """
        self.state.restore(known=self._home)
        try:
            self._greenlet.switch()
        finally:
            self.state = ThreadState.current(self._home.random.device)
            self._home.restore_modes(known=self.state.modes)

    def pause(self, units: tuple[Unit, ...]) -> None:
        """Wait until `units` are open to this coroutine. Called from within it."""
        self.request = units
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch()
        if self._cancelled:  # code in a `finally` goes on calling the model
            raise greenlet.GreenletExit
        self.request = ()

    def cancel(self) -> None:
        """Unwind the pass from where it is, in the contexts that it has entered."""
        self._cancelled = True
        self.state.restore_modes()
        try:
            self._greenlet.throw(greenlet.GreenletExit)
        except Exception:
            logger.warning("a forward pass failed while it was unwound", exc_info=True)
        finally:
            self._home.restore_modes()

    def forget(self) -> None:
        """Let go of state that refers to the hooks where no garbage collection sees it."""
        del self.state, self._home

    def _run(self) -> None:
        if self.kept:
            self.pause(tuple(self.kept))
            self.read.update(self.kept)
        self.value = self._closure()
        self.close()


def bind(binding: Binding) -> None:
    """Make parameters, and what quantized ones consist of, show their tensors."""
    for target, tensor in binding:
        target.data = tensor
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()  # it holds casts of the parameters' former values


class Lockstep:
    """The scheduler of one step.

    Args:
        loader: Loads units.
        perturbations: One per copy of the weights; coroutine i of each closure runs on copy i.
        activate: Called with the coroutine that is about to run, and with None when none is.
        restore: Called with each unit that is no longer open to any coroutine.
        state: Keeps apart what the coroutines leave on the model's objects.
    """

    def __init__(
        self,
        loader: Loader,
        perturbations: Sequence[Perturbation],
        activate: Callable[[Coroutine | None], None],
        restore: Callable[[Unit], None],
        state: PassState,
    ) -> None:
        self._loader, self._perturbations = loader, tuple(perturbations)
        self._activate, self._restore, self._state = activate, restore, state
        self._loaded: dict[Unit, Loaded] = {}

    def run(
        self,
        closures: Sequence[Closure],
        kept: list[Unit],
        device: torch.device,
        *,
        trial: bool = False,
        together: bool = False,
    ) -> list[list[Any]]:
        """Run each closure once per perturbed copy, all in lockstep; return a row per closure.

        With `together` each closure runs all copies in one call, and the row has its one value.

        All start from the same random state, so that dropout masks agree, and with what was on the
        model's objects before. Afterwards both are as one ordinary call leaves them; as before,
        after an exception or a trial. An exception of a coroutine is raised after all are unwound.

        Raises:
            SharedState: The passes have to run again.
        """
        home = ThreadState.current(device)
        copies = range(1 if together else len(self._perturbations))
        coroutines = [Coroutine(i, closure, kept, home) for closure in closures for i in copies]
        last: Coroutine | None = None  # the one whose state stays
        self._state.begin()
        with ExitStack() as at_end:  # all of it happens, whatever of it fails; the last comes first
            for coroutine in coroutines:
                at_end.callback(coroutine.forget)
            at_end.callback(lambda: self._state.end(last))
            at_end.callback(lambda: (last.state if last else home).random.restore())
            at_end.callback(self._unload_unused, [])
            at_end.callback(self._activate, None)
            for coroutine in reversed(coroutines):
                at_end.callback(self._end, coroutine)
            for coroutine in coroutines:
                self._resume(coroutine)
            while live := [c for c in coroutines if not c.done]:
                self._serve(live)
            last = None if trial else coroutines[0]
        values = [c.value for c in coroutines]
        return [values[i : i + len(copies)] for i in range(0, len(values), len(copies))]

    def _end(self, coroutine: Coroutine) -> None:
        self._activate(coroutine)
        if not coroutine.done:
            self._state.enter(coroutine)
            coroutine.cancel()
        coroutine.close()

    def _serve(self, live: list[Coroutine]) -> None:
        """Load the units that the first of `live` waits for, for all that wait for the same."""
        wanted = live[0].request
        for unit in wanted:
            if unit not in self._loaded:
                self._loaded[unit] = self._loader.load(unit, self._perturbations)
        # Sorted by copy, so that each copy is written at most once.
        for coroutine in sorted(live, key=lambda c: c.index):
            if coroutine.request == wanted:
                for unit in coroutine.open_units().union(wanted):
                    bind(self._loader.copy(self._loaded[unit], coroutine.index))
                self._resume(coroutine)
        self._unload_unused(live)

    def _resume(self, coroutine: Coroutine) -> None:
        self._activate(coroutine)
        self._state.enter(coroutine)
        try:
            recorder = self._loader.device.recorder
            if recorder is None:
                coroutine.resume()
            else:
                recorder.forward(coroutine.request, coroutine.index, coroutine.resume)
        finally:
            self._state.leave()
            self._activate(None)

    def _unload_unused(self, live: list[Coroutine]) -> None:
        for unit in list(self._loaded):
            if not any(coroutine.has(unit) for coroutine in live):
                self._restore(unit)
                self._loader.unload(self._loaded.pop(unit))
