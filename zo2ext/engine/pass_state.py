"""Keep apart what forward passes in lockstep leave on Python objects.

Many forwards leave something behind for code that runs later in the same pass: a router keeps its
auxiliary loss on ``self``, a hook keeps activations in a dictionary, a context manager switches an
adapter off. Passes in lockstep would find what another pass has left. Therefore

- in the first step, all objects on which a forward may leave something are compared, each time a
  pass pauses, with what they were;
- what a pass has changed is from then on its own: saved when the pass pauses, and restored when it
  resumes. Each pass starts with what was there before the step. After the step, what the first pass
  has left is there, as with random generators; after an exception, what was there before;
- a tensor that is written in place, such as the running mean of a batch norm, is shared: all passes
  update it, one after the other. It is kept apart if a pass uses it again after a pause.
"""

from __future__ import annotations

import random
from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from zo2ext._random_state import HostGenerators
from zo2ext.engine.pass_places import Finder, Generators, Namespace, Place, Values


class SharedState(Exception):
    """Passes turned out to share what only now is kept apart: they have to run again."""


class PassState:
    """Keeps apart what the passes of one model leave on its objects.

    Passes are identified by objects of the caller's.

    Args:
        restored: Ids of dictionaries that are restored whenever a unit is loaded.

    Attributes:
        learning: Whether the first step is still running, in which `used` is to be called.
        running: The pass that is running; None between passes.
    """

    def __init__(self, model: nn.Module, restored: Set[int]) -> None:
        self._model, self.learning = model, True
        # Each module has its own turn, in which its objects are looked into.
        self._skipped = restored | {id(module) for module in model.modules()}
        self._generators = Generators(random)
        self._own = dict[tuple[type, int], Place]()  # what passes have been seen to change
        self._before = list[tuple[Place, Any]]()  # everything, before the first step
        self._tensors = dict[int, Values]()  # those before the first step, by id
        self._contents = dict[int, Tensor]()  # of each of them, as last seen
        self._home = dict[Place, Any]()
        self._saved = dict[object, dict[Place, Any]]()
        self._unused: HostGenerators | None = None  # state of generators that no pass has used
        self.running: object | None = None
        self._originals = dict[int, Tensor]()  # of those that were written, before the step
        self._used = set[int]()  # ids of tensors that were used since the last pause
        self._written = dict[object, set[int]]()  # and of those that were written, by the pass

    def begin(self) -> None:
        """Note what is there before the passes of a step."""
        finder = Finder(self._skipped)
        for place in self._own.values():
            finder.add(place)
            for value in place.inside():
                finder.walk(value)
        own = [p for k, p in finder.places.items() if k in self._own or not isinstance(p, Values)]
        self._home = {place: place.read() for place in own}
        self._unused = None if self._generators in self._home else self._generators.read()
        self._saved.clear()
        self._written.clear()
        if self.learning:
            self._note_everything()

    def enter(self, this: object) -> None:
        """Let the objects show what pass `this` has left."""
        saved = self._saved.get(this, {})
        for place, contents in self._home.items():
            place.write(saved.get(place, contents))
        self.running = this  # only now: the writes above are not the pass's

    def leave(self) -> None:
        """Save what the running pass has left so far."""
        this, self.running = self.running, None
        if self.learning:
            self._learn(this)
        self._saved[this] = {place: place.read() for place in self._home}

    def end(self, this: object | None) -> None:
        """Leave what pass `this` has left, or, if None, what was there before the step.

        Raises:
            SharedState: The passes have drawn from generators that none had used before.
        """
        if this is None:
            for key, contents in self._originals.items():
                self._tensors[key].write(contents)
        self.enter(this)
        self.running = None
        self._home.clear()
        self._saved.clear()
        unused = self._unused
        if not self.learning and unused is not None and self._generators.changed(unused):
            self._generators.write(unused)
            if this is not None:
                self._own[Generators, id(random)] = self._generators
                raise SharedState

    def finish_learning(self) -> None:
        """Take what the passes have changed so far for all that they ever change."""
        self.learning = False
        self._before.clear()
        self._tensors.clear()
        self._contents.clear()
        self._originals.clear()

    def used(self, tensor: Tensor) -> None:
        """Note that the running pass uses `tensor`.

        Raises:
            SharedState: The pass wrote it before it paused, so other passes may have, too.
        """
        if self.running is None or id(tensor) not in self._tensors:
            return
        self._used.add(id(tensor))
        if id(tensor) in self._written.get(self.running, ()):
            self._own[Values, id(tensor)] = self._tensors[id(tensor)]
            raise SharedState

    def _note_everything(self) -> None:
        finder = Finder(self._skipped)
        finder.add(self._generators)
        for module in self._model.modules():
            finder.module(module)
        self._before, self._tensors, self._contents, self._originals = [], {}, {}, {}
        for key, place in finder.places.items():
            if key in self._own:
                continue
            if isinstance(place, Values):
                self._tensors[id(place.owner)] = place
                self._contents[id(place.owner)] = place.read()
            else:
                self._before.append((place, place.read()))

    def _learn(self, this: object) -> None:
        """Find what pass `this` has changed."""
        found = [(p, contents) for p, contents in self._before if p.changed(contents)]
        for place, contents in found:
            if place not in self._home:
                self._own[type(place), id(place.owner)] = place
                self._home[place] = contents
            if isinstance(place, Namespace):
                place.learn(contents)
        written = self._written.setdefault(this, set())
        for key in self._used:
            tensor, contents = self._tensors[key], self._contents[key]
            if tensor.changed(contents):
                written.add(key)
                self._originals.setdefault(key, contents)
                self._contents[key] = tensor.read()
        self._used.clear()
