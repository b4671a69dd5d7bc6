"""Divide a model into units, the tensors that are loaded together, without model-specific code.

An *entry* is a module whose forward pauses until its weights are loaded: a decoder block, or any
other module that owns parameters. A *unit* is the set of tensors that the same entries need. That
is usually one entry's own tensors, but a weight tied between the embedding and the head is a unit
of its own, which both need. Each tensor belongs to exactly one unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from zo2ext.config import Granularity
from zo2ext.model.quantized import Component, Target, components

_DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks")


@dataclass(eq=False)
class TensorSpec:
    """One parameter of the model. Tied uses are one parameter."""

    id: int  # position in named_parameters(); the noise contract's tensor id
    name: str
    parameter: nn.Parameter
    components: tuple[Component, ...] = ()  # tensors that a quantized parameter consists of

    @property
    def targets(self) -> tuple[Target, ...]:
        """Objects that show the tensors of the unit's slab."""
        return self.components or (self.parameter,)


@dataclass(eq=False)
class Unit:
    """Tensors that are loaded together."""

    index: int
    name: str
    tensors: list[TensorSpec]


@dataclass(eq=False)
class Entry:
    """A module that needs `units` while it runs.

    If the module owns parameters and contains other entries, its forward does not pause: its own
    parameters are loaded when they are read.
    """

    name: str
    module: nn.Module
    paused: bool
    units: tuple[Unit, ...] = field(default=())


def find_units(model: nn.Module, granularity: Granularity) -> tuple[list[Unit], list[Entry]]:
    """Return the units of `model`, in the order of their first tensors, and its entries.

    Raises:
        UnsupportedModel: A quantized parameter cannot be taken apart.
    """
    entries = _entries(model, granularity)
    modules = _owners(model)
    names = {
        id(p): TensorSpec(i, n, p, components(n, p, modules[id(p)]))
        for i, (n, p) in enumerate(model.named_parameters())
    }
    users: dict[int, list[Entry]] = {key: [] for key in names}
    for entry in entries:
        for parameter in _needed(entry):
            if entry not in users[id(parameter)]:
                users[id(parameter)].append(entry)

    groups: dict[tuple[int, ...], list[TensorSpec]] = {}
    for key, spec in names.items():
        groups.setdefault(tuple(id(e) for e in users[key]), []).append(spec)
    units: list[Unit] = []
    for tensors in groups.values():
        owners = users[id(tensors[0].parameter)]
        units.append(Unit(len(units), owners[0].name or tensors[0].name, tensors))
        for entry in owners:
            entry.units += (units[-1],)
    return units, entries


def _entries(model: nn.Module, granularity: Granularity) -> list[Entry]:
    blocks = decoder_blocks(model) if granularity is Granularity.BLOCK else {}
    entries, inside = [], set[int]()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if module in blocks.values():
            entries.append(Entry(name, module, paused=True))
            inside |= {id(m) for m in module.modules()}
        elif any(p is not None for p in module._parameters.values()):
            holds_others = any(_holds_parameters(child) for child in module.children())
            entries.append(Entry(name, module, paused=not holds_others))
    return entries


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that have a parameter, by the parameter's id."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    return owners


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _needed(entry: Entry) -> Iterator[nn.Parameter]:
    return entry.module.parameters(recurse=entry.paused)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of `model` by name, without blocks inside blocks.

    A block is a member of a module list whose members have forwards of their own. The list has to
    be as long as a depth in the model's config, or contain a class that transformers does not split
    over devices, or contain most of the model's parameters.
    """
    unsplit_classes, depths = set[str](), set[int]()
    for module in model.modules():
        unsplit_classes |= set(getattr(module, "_no_split_modules", None) or ())
        config = getattr(module, "config", None)
        values = vars(config).items() if hasattr(config, "__dict__") else ()
        depths |= {
            v for k, v in values if isinstance(v, int) and (k in _DEPTH or k.endswith("_layers"))
        }
    total = sum(p.numel() for p in model.parameters())

    blocks: dict[str, nn.Module] = {}
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or any(name.startswith(b + ".") for b in blocks):
            continue
        members = [(f"{name}.{i}", m) for i, m in enumerate(modules) if _holds_parameters(m)]
        if not members or any(type(m).forward is nn.Module.forward for _, m in members):
            continue
        if any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for _, m in members):
            continue
        if (
            len(modules) in depths
            or any(type(m).__name__ in unsplit_classes for _, m in members)
            or 2 * sum(p.numel() for p in modules.parameters()) > total
        ):
            blocks.update(members)
    return blocks
