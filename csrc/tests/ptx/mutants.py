"""Deliberate faults, one instruction each, that the checks must notice."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One changed statement of a translated kernel.

    Attributes:
        kernel: Pattern of the kernel's mangled name, which finds one kernel.
        statement: Pattern of the statement. Of all that match, the middle one is changed.
        changed: What replaces the match.
        architecture: The one whose translation is changed.
    """

    kernel: str
    statement: str
    changed: str
    architecture: int = 80

    def belongs_to(self, kernel: str, architecture: int) -> bool:
        """Return whether this is the kernel to change."""
        return architecture == self.architecture and re.search(self.kernel, kernel) is not None

    def change(self, lines: list[str]) -> list[str]:
        """Return the statements with this fault in one of them."""
        places = [i for i, line in enumerate(lines) if re.search(self.statement, line)]
        if not places:
            raise SystemExit(f"mutants.py: no statement of {self.kernel} matches {self.statement}")
        i = places[len(places) // 2]
        changed = re.sub(self.statement, self.changed, lines[i], count=1)
        return [*lines[:i], changed, *lines[i + 1 :]]


MUTANTS = [
    # The last bit of a coefficient of the sine, behind weights of 16 bits.
    Mutant(r"UpdateDualINS_8BFloat16ES.*E0ELNS_8RoundingE0", "= 0x3F8E2C19u", "= 0x3F8E2C18u"),
    # A random bit fewer.
    Mutant(r"PackINS_7Float16ELNS_8RoundingE1", "{0x1fffu}", "{0xfffu}"),
    # The comparison at the end of a slab.
    Mutant(r"PackINS_8BFloat16ELNS_8RoundingE1", r"(r\d+) >= (r\d+)", r"\1 > \2"),
    # The sign of a Rademacher direction, and a round of Philox.
    Mutant(r"MakeNoiseINS_7Float32ELNS_12DistributionE1", r" \^ ", " | "),
    # The scale of a group.
    Mutant(r"PackGroupsINS_5SplitE", r"multiply\(m, (\w+), (\w+)\)", r"add(m, \1, \2)"),
    # The row of a matrix, from the place of an element among its columns.
    Mutant(r"FoldILb0EE", r"(r\d+) / (r\d+)", r"\1 % \2"),
    # The conversion to bfloat16 of a GPU that has none.
    Mutant(
        r"PackINS_8BFloat16ELNS_8RoundingE0", r"\+ uint32_t{0x7fffu}", "+ uint32_t{0x6fffu}", 75
    ),
]
