"""The settings of a run: each is declared once, here, with its default and its help text.

The command line and the trainers' arguments take their fields from `ZOConfig` through
`inherit_settings`. This module imports no torch, so that wrong options are refused at once.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from zo2ext._choices import Distribution, Estimator, Rounding
from zo2ext.errors import UserError

if TYPE_CHECKING:
    import torch

    from zo2ext.ops.formats import Storage

Class = TypeVar("Class", bound=type)

METHOD, PLACE = "method", "memory and speed"
"""Groups of settings: those that define what is computed, and those that never change a result."""

FIND = "auto"
"""Learning rate that is found before a run."""

STORAGE_FORMATS = ("fp32", "bf16", "fp16", "e4m3", "split")
COMPUTE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

ONCE = {
    "estimator": Estimator.TWO_SIDED.value,
    "normalize": False,
    "clip": None,
    "rank": None,
    "joined": False,
}
"""Values that define the runs of journals without these settings."""

MAX_RANK = 64
"""Largest rank of factored directions."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|KB|MB|GB|TB|B)")
_UNITS = {
    "B": 1,
    **{f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")},
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")},
}


class Granularity(StrEnum):
    """Size of a unit: a decoder block, or a single module that owns parameters."""

    BLOCK = "block"
    MODULE = "module"


class Store(StrEnum):
    """Where weights rest: host memory, files, or host memory that the ranks of a host share."""

    HOST = "host"
    DISK = "disk"
    SHARED = "shared"


def parse_size(text: str) -> int:
    """Return the bytes in a size such as ``"8GiB"``, ``"500 MB"`` or ``"1.5GiB"``.

    Raises:
        ValueError: `text` is not a number followed by a unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"a size is a number and a unit, such as '8GiB', got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


PRESETS: dict[str, dict[str, Any]] = {
    "mezo": {"estimator": "two_sided", "directions": 1},
    "fzoo": {"directions": 8, "normalize": True, "distribution": "rademacher"},
    "es": {"directions": 30, "normalize": True},
    "lozo": {"rank": 2, "write_back": 50},
    "eggroll": {"rank": 1, "write_back": 1, "directions": 32, "normalize": True},
}
"""Settings of published methods: MeZO (arXiv:2305.17333), FZOO (arXiv:2506.09034; with the mean of
the losses instead of a forward pass at the weights themselves), evolution strategies at scale
(arXiv:2509.24372), LOZO (arXiv:2410.07698) and EGGROLL (arXiv:2511.16652; with directions for one
GPU). All have eps 1e-3; learning rates are left to the rule for them.

Example:
    >>> zo2ext.ZOConfig(**zo2ext.PRESETS["fzoo"], storage="bf16")
"""


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    group: str = PLACE,
    defines: bool = False,
    kind: Any = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare a setting as a dataclass field.

    Args:
        default: Default value. If None, `help` explains what happens then.
        help: Meaning of the setting, for `--help` and the documentation.
        group: Heading that `--help` lists it under.
        defines: Whether it decides a run's bits and belongs into its journal.
        kind: Type that the command line reads it as, if not the annotated one.
        choices: Words that the command line accepts.
    """
    metadata = {"help": help, "group": group, "defines": defines, "kind": kind, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ZOConfig:
    """Settings of one zeroth-order run. Immutable; `replace` returns a changed copy."""

    eps: float = setting(
        1e-3,
        "Perturbation scale, in the weights' own units. 1e-3, as in MeZO: large enough that the "
        "two losses differ in float32, small enough that their difference is a slope.",
        group=METHOD,
        defines=True,
    )
    lr: float | str | None = setting(
        None,
        "Learning rate: a number, or auto, which finds one by 40 to 120 steps before the run that "
        "leave no trace in the weights. Default: 0.05 / sqrt(trained weights), which is 1e-4 for "
        "260 thousand and 4e-7 for 13 billion, times n / 2 with n > 1 directions; normalized, "
        "sqrt(2 n / trained weights).",
        group=METHOD,
        kind=str,
    )
    weight_decay: float = setting(
        0.0,
        "Decoupled weight decay, per unit of learning rate, of tensors of two or more dimensions.",
        group=METHOD,
    )
    directions: int | str = setting(
        1,
        "Directions that a step averages over. All their forward passes share one load of the "
        "weights, so that where weights stream, 8 cost little more time than 1. auto: 8, or up to "
        "16 whose passes take no longer than the upload; the journal records the number.",
        group=METHOD,
        defines=True,
        kind=str,
    )
    estimator: Estimator | None = setting(
        None,
        "Forward passes of a step: two_sided, at +eps and at -eps along each direction, as in "
        "MeZO; or centered, at +eps alone, where slopes are relative to the mean loss: half the "
        "passes. Default: two_sided with one direction, centered with more.",
        group=METHOD,
        defines=True,
        kind=Estimator,
    )
    normalize: bool | None = setting(
        None,
        "Divide the slopes along a step's directions by their root mean square, as FZOO and "
        "evolution strategies do: the length of a step then depends on the learning rate alone, "
        "which has another unit, and a rate that is too high ends no run. Default: yes if the "
        "estimator is centered.",
        group=METHOD,
        defines=True,
        kind=bool,
    )
    clip: float | None = setting(
        None,
        "Shorten a step whose slopes are larger than this multiple of their running median, such "
        "as 2: a step too far then costs less. Default: never.",
        group=METHOD,
        defines=True,
    )
    seed: int = setting(0, "Seed of directions, batches and samples.", group=METHOD, defines=True)
    distribution: Distribution = setting(
        Distribution.GAUSSIAN,
        "Distribution of the directions: gaussian, as in MeZO, or rademacher (+1 or -1, cheaper).",
        group=METHOD,
        defines=True,
    )
    rank: int | None = setting(
        None,
        "Factored directions: matrices move along products of two factors with so many columns, "
        "such as 4, which are applied to activations. A step then costs little more than its "
        "forward passes, and no perturbed copies. Default: dense directions, as in MeZO.",
        group=METHOD,
        defines=True,
    )
    joined: bool = setting(
        False,
        "Run the forward passes of a step as one batch, which reads the weights once for all of "
        "them: faster where passes are short, such as below 200 tokens. Needs a rank, and with "
        "several directions write_back=1; losses must be tensors.",
        group=METHOD,
        defines=True,
    )
    storage: "Storage | torch.dtype | str | None" = setting(
        None,
        "Format of the weights at rest and in transfers. Default: each tensor's own dtype.",
        group=METHOD,
        defines=True,
        kind=str,
        choices=STORAGE_FORMATS,
    )
    compute_dtype: "torch.dtype | None" = setting(
        None,
        "Dtype of the weights in the forward pass. Default: each tensor's own dtype.",
        group=METHOD,
        defines=True,
        kind=str,
        choices=(*COMPUTE_DTYPES, *COMPUTE_DTYPES.values()),
    )
    rounding: Rounding = setting(
        Rounding.STOCHASTIC,
        "Rounding to the storage format at write-backs. At small learning rates most updates are "
        "below half an ulp of a bfloat16 weight, and rounding to nearest loses them all.",
        group=METHOD,
        defines=True,
    )
    write_back: int | str = setting(
        "auto",
        "Steps between write-backs of the weights, which round them to storage: a count; never, "
        "which replays all updates at each load; or auto: on a GPU that weights stream to, the "
        "count that is fastest by a prediction from measured rates, mostly 16, and 1 elsewhere. "
        "The journal records the count, and a continued run keeps it.",
        group=METHOD,
        defines=True,
        kind=str,
    )
    journal_sync: int = setting(
        1,
        "Steps between syncs of the journal with the disk, which go on beside the next step. With "
        "1, a power failure loses at most the last finished step; killing the process loses none.",
    )
    device: "str | torch.device | None" = setting(
        None,
        "Where the model runs: cuda, cuda:1, cpu, or simulated (for tests). Default: cuda if there "
        "is one, otherwise cpu.",
        kind=str,
    )
    granularity: Granularity = setting(
        Granularity.BLOCK,
        "What is loaded at once: a decoder block, or a single module (least device memory).",
    )
    one_copy: bool = setting(
        False,
        "Perturb a unit's weights for one forward pass after the other in one buffer: half the "
        "memory for copies or less, and one more pass of noise.",
    )
    slots: int = setting(
        3,
        "Number of units, the largest of the model, that fit the device memory through which "
        "streamed units pass, at least 2. More smaller ones fit.",
    )
    resident: int | str = setting(
        0,
        "Units that stay on the device: a count, all, or a size such as 8GiB. The rest streams.",
        kind=str,
    )
    store: Store = setting(
        Store.HOST,
        "Where weights rest: host memory, memory that the ranks of a host share, or disk for "
        "models larger than that.",
    )
    host_memory: str = setting(
        "4GiB", "Host memory that the disk store may take, enough for a unit or a few."
    )

    def __post_init__(self) -> None:
        from zo2ext.ops.formats import Storage

        for name, enum in (
            ("distribution", Distribution),
            ("rounding", Rounding),
            ("estimator", Estimator),
            ("granularity", Granularity),
            ("store", Store),
        ):
            expected = "one of " + ", ".join(repr(member.value) for member in enum)
            if getattr(type(self), name) is not None:
                self._convert(name, enum, expected)
            elif getattr(self, name) is not None:
                self._convert(name, enum, f"{expected}, or None")
        for name in ("directions", "write_back", "resident"):
            if isinstance(getattr(self, name), str) and getattr(self, name).isdecimal():
                self._set(name, int(getattr(self, name)))
        self._check_number("eps", lambda v: v > 0, "a positive number")
        if isinstance(self.lr, str) and self.lr != FIND:
            self._convert("lr", float, "a number >= 0 or 'auto'")
        if self.lr not in (None, FIND):
            self._check_number("lr", lambda v: v >= 0, "a number >= 0")
        self._check_number("weight_decay", lambda v: v >= 0, "a number >= 0")
        if self.directions != "auto":
            self._check_integer("directions", 1, 2**16, "an integer from 1 to 65535, or 'auto'")
        if self.estimator is Estimator.CENTERED and self.directions == 1:
            raise UserError(
                "directions must be at least 2 with estimator='centered', which compares them "
                "with each other, got 1"
            )
        if self.rank is not None:
            self._check_integer("rank", 1, MAX_RANK + 1, f"an integer from 1 to {MAX_RANK} or None")
        if not isinstance(self.joined, bool):
            raise self._refusal("joined", "True or False")
        if self.joined and self.rank is None:
            raise UserError("joined=True needs factored directions: set rank, such as rank=4")
        if self.joined and self.directions != 1 and self.write_back not in (1, "auto"):
            raise UserError(
                "write_back must be 1 with joined=True and several directions, got "
                f"{self.write_back!r}"
            )
        if self.clip is not None:
            self._check_number("clip", lambda v: v >= 1, "a number >= 1 or None")
        self._check_integer("seed", 0, 2**64)
        if not isinstance(self.write_back, str):
            self._check_integer("write_back", 1, 2**31)
        elif self.write_back not in ("never", "auto"):
            raise self._refusal("write_back", "an integer from 1, 'never' or 'auto'")
        self._check_integer("slots", 2, 1024)
        self._check_integer("journal_sync", 1, 2**31)
        if not isinstance(self.one_copy, bool):
            raise self._refusal("one_copy", "True or False")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise self._refusal("normalize", "True, False or None")
        if self.storage is not None:
            formats = ", ".join(STORAGE_FORMATS)
            self._convert("storage", Storage.of, f"one of {formats}, a torch dtype or None")
        if self.compute_dtype is not None:
            self._convert("compute_dtype", _compute_dtype, f"{', '.join(COMPUTE_DTYPES)} or None")
        if self.device is not None and not _is_device(self.device):
            raise self._refusal("device", "a device name such as 'cuda' or 'cpu', or None")
        if self.resident != "all":
            expected = "a count, 'all', or a size such as '8GiB'"
            if isinstance(self.resident, str):
                self._check_size("resident", expected)
            else:
                self._check_integer("resident", 0, 2**31, expected)
        self._check_size("host_memory", "a size such as '4GiB'")

    def defining(self) -> dict[str, Any]:
        """Return the settings that decide a run's bits, without the learning rate, as JSON.

        Settings that journals once lacked are left out where they have the value of then.
        """
        names = [entry.name for entry in fields(self) if entry.metadata["defines"]]
        found = {name: _plain(getattr(self, name)) for name in names}
        found |= {"estimator": self.slopes.value, "normalize": self.normalized}
        return {n: v for n, v in found.items() if n not in ONCE or v != ONCE[n]}

    def words(self) -> dict[str, Any]:
        """Return all settings as the command line and JSON take them."""
        values = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}
        return {n: v.removeprefix("torch.") if isinstance(v, str) else v for n, v in values.items()}

    def with_learning_rate(self, weights: int) -> "ZOConfig":
        """Return this config with a learning rate for `weights` trained weights if it has none.

        0.05 / sqrt(weights) with one direction: 1e-4 for 260 thousand weights and 4e-7 for 13
        billion, which worked best for a small model here, and for large ones in MeZO
        (arXiv:2305.17333). The mean over n directions is shorter by about sqrt(n) and less often
        far too long. Normalized steps get a length per weight instead: 8e-3 for 260 thousand
        weights and 8 directions; see docs/learning.md.
        """
        if self.lr is not None:
            return self
        weights, n = max(weights, 1), self.count
        if self.normalized:
            return self.replace(lr=math.sqrt(2 * n / weights))
        return self.replace(lr=0.05 / math.sqrt(weights) * max(1, n / 2))

    @property
    def count(self) -> int:
        """Number of directions.

        Raises:
            ValueError: It is ``"auto"``, which is not decided yet.
        """
        if isinstance(self.directions, int):
            return self.directions
        raise ValueError("directions is 'auto', which is not decided yet")

    @property
    def slopes(self) -> Estimator:
        """The estimator, decided where `estimator` is None."""
        default = Estimator.TWO_SIDED if self.directions == 1 else Estimator.CENTERED
        return self.estimator or default

    @property
    def normalized(self) -> bool:
        """Whether slopes are normalized, decided where `normalize` is None."""
        return self.slopes is Estimator.CENTERED if self.normalize is None else self.normalize

    @property
    def forwards(self) -> int:
        """Number of forward passes of a step."""
        return self.slopes.sides * self.count

    @property
    def copies(self) -> int:
        """Number of perturbed copies of a unit that are on the device at once."""
        return 1 if self.one_copy or self.rank else self.forwards

    @property
    def write_back_period(self) -> int | None:
        """Steps between write-backs that fall due by themselves; None where none do."""
        if isinstance(self.write_back, int):
            return self.write_back
        if self.write_back == "never":
            return None
        raise ValueError("write_back is 'auto', which is not decided yet")

    def replace(self, **changes: Any) -> "ZOConfig":
        """Return a copy with `changes`, checked like a new one."""
        return replace(self, **changes)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _refusal(self, name: str, expected: str) -> UserError:
        return UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _convert(self, name: str, convert: Callable[[Any], Any], expected: str) -> None:
        try:
            self._set(name, convert(getattr(self, name)))
        except ValueError:
            raise self._refusal(name, expected) from None

    def _check_number(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and holds(value)):
            raise self._refusal(name, f"{expected}, finite")

    def _check_integer(self, name: str, low: int, high: int, expected: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
            raise self._refusal(name, expected or f"an integer from {low} to {high - 1}")

    def _check_size(self, name: str, expected: str) -> None:
        try:
            parse_size(getattr(self, name))
        except (AttributeError, ValueError):
            raise self._refusal(name, expected) from None


ZOConfig.__doc__ = f"{ZOConfig.__doc__}\n\n    Attributes:\n" + "\n".join(
    f"        {entry.name}: {entry.metadata['help']}" for entry in fields(ZOConfig)
)


@dataclass(kw_only=True)
class RankSettings:
    """Settings of a run of several processes."""

    perturb_parallel: int = setting(
        1, "Under torchrun: 2 runs the forward passes at +eps and at -eps in different processes."
    )
    direction_parallel: int = setting(
        1,
        "Under torchrun: processes that share out a step's directions. What is left of the "
        "processes shares out the batch.",
    )
    deadline: float = setting(
        120.0,
        "Under torchrun: seconds that processes wait for each other in a step once they are done "
        "themselves.",
    )


def inherit_settings(*only: str, leave_out: Sequence[str] = ()) -> Callable[[Class], Class]:
    """Return a class decorator that adds the fields of `ZOConfig`, typed as a command line reads
    them, to a class that is about to become a dataclass.

    Args:
        only: Settings to add; all if none are named.
        leave_out: Settings that the class does without, or declares under another name.
    """

    def add(cls: Class) -> Class:
        own = inspect.get_annotations(cls)
        for entry in fields(ZOConfig):
            wanted = entry.name in only if only else entry.name not in leave_out
            if wanted and entry.name not in own:
                kind: Any = entry.metadata["kind"] or entry.type
                own[entry.name] = kind | None if entry.default is None else kind
                # HfArgumentParser hands all metadata on to argparse: no more than that takes.
                words = {k: entry.metadata[k] for k in ("help", "choices") if entry.metadata[k]}
                setattr(cls, entry.name, field(default=entry.default, metadata=words))
        cls.__annotations__ = own
        return cls

    return add


def group_of(name: str) -> str | None:
    """Return the group of the setting `name`; None if it is not a setting of `ZOConfig`."""
    return next((f.metadata["group"] for f in fields(ZOConfig) if f.name == name), None)


def config_from(arguments: Any, **changes: Any) -> ZOConfig:
    """Return the `ZOConfig` whose settings are attributes of `arguments`, but for `changes`.

    Raises:
        ValueError: A setting is wrong; the message names it and its value.
    """
    names = [entry.name for entry in fields(ZOConfig) if hasattr(arguments, entry.name)]
    return ZOConfig(**{**{name: getattr(arguments, name) for name in names}, **changes})


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _compute_dtype(value: Any) -> "torch.dtype":
    import torch

    from zo2ext.ops.formats import TRAINABLE_DTYPES

    dtype = getattr(torch, COMPUTE_DTYPES.get(value, value)) if _is_word(value) else value
    if dtype not in TRAINABLE_DTYPES:
        raise ValueError(value)
    return dtype  # type: ignore[no-any-return]


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value in (*COMPUTE_DTYPES, *COMPUTE_DTYPES.values())


def _is_device(value: Any) -> bool:
    import torch

    return isinstance(value, (str, torch.device))
