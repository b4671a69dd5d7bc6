"""What each storage format makes of a run: held-out loss after the same steps, from the same start.

    python benchmarks/precision.py --data DIR --out FILE.json [--minutes N] [--picture FILE.png]

DIR holds `stories260K`, a model folder, and `text/tinyshakespeare.txt`. Batches of 8 x 128 tokens,
eps 1e-3, two settings of learning rate and steps, three seeds each. Weights are computed with in
float32 throughout, so that only what they rest in differs; the eager loop perturbs bfloat16 weights
in place and computes in bfloat16, as published codes do. Every finished run is in FILE at once;
started again, the rest is run. `drift` is what lr 0 does to the weights in 1000 steps: relative, in
the 2-norm.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import timing
import torch
from eager import EagerMeZO
from tables import precision_rows
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import zo2ext
from zo2ext._files import write_atomically
from zo2ext.ops import Rounding
from zo2ext.tasks.text import TextData, held_out_loss, load_text

EPS, BATCH, LENGTH, SEEDS = 1e-3, 8, 128, 3
DRIFT_STEPS = 1000
EAGER = "bf16 in place, eager"


@dataclass(frozen=True)
class Setting:
    """How long and how fast."""

    lr: float
    steps: int

    def __str__(self) -> str:
        return f"lr {self.lr:g} x {self.steps}"


SETTINGS = [Setting(1e-4, 600), Setting(3e-6, 2400)]
BF16, FP16 = torch.bfloat16, torch.float16
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 nearest": {"storage": BF16, "rounding": Rounding.NEAREST},
    "bf16 stochastic": {"storage": BF16},
    "bf16 stochastic, K 16": {"storage": BF16, "write_back": 16},
    "bf16 nearest, K 16": {"storage": BF16, "rounding": Rounding.NEAREST, "write_back": 16},
    "fp16 nearest": {"storage": FP16, "rounding": Rounding.NEAREST},
    "fp16 stochastic": {"storage": FP16},
    "e4m3 nearest": {"storage": "e4m3", "rounding": Rounding.NEAREST},
    "e4m3 stochastic": {"storage": "e4m3"},
    "e4m3 stochastic, K 16": {"storage": "e4m3", "write_back": 16},
    "split": {"storage": "split"},
    "split, K 4": {"storage": "split", "write_back": 4},
    "split, K 16": {"storage": "split", "write_back": 16},
}


class Bench:
    """The model and the text, loaded once."""

    def __init__(self, folder: Path) -> None:
        source = folder / "stories260K"
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
        self.data: TextData = load_text(
            folder / "text" / "tinyshakespeare.txt",
            lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            seq_len=LENGTH,
        )

    def judge(self, model: Any) -> float:
        """Over all held-out windows."""
        cpu = torch.device("cpu")
        return held_out_loss(model, self.data, batch_size=32, windows=10**9, device=cpu)

    def losses(self, name: str, setting: Setting, seed: int) -> float:
        """The held-out loss at the end of one run."""
        model = copy.deepcopy(self.model)
        batches = (
            self.data.batch(step, batch_size=BATCH, seed=seed)
            for step in tqdm(range(setting.steps), desc=f"{name}, {setting}, {seed}", leave=False)
        )
        if name == EAGER:
            model = model.to(BF16)
            eager = EagerMeZO([p.data for p in model.parameters()], lr=setting.lr, eps=EPS)
            for step, ids in enumerate(batches):
                eager.step(seed * 10**6 + step, lambda ids=ids: _loss(model, ids).float())
            return self.judge(model.float())
        config = zo2ext.ZOConfig(lr=setting.lr, eps=EPS, seed=seed, device="cpu", **FORMATS[name])
        with zo2ext.offload(model, config) as zo:
            for ids in batches:
                zo.step(lambda ids=ids: _loss(model, ids))
            return self.judge(model)

    def drift(self, name: str) -> float:
        """How far lr 0 moves the weights: |after - before| / |before|."""
        model = copy.deepcopy(self.model)
        ids = self.data.batch(0, batch_size=1, seed=0)[:, :2]
        if name == EAGER:
            model = model.to(BF16)
            before = _flat(model.state_dict())
            eager = EagerMeZO([p.data for p in model.parameters()], lr=0.0, eps=EPS)
            for step in range(DRIFT_STEPS):
                eager.step(step, lambda: _loss(model, ids).float())
            after = _flat(model.state_dict())
        else:
            config = zo2ext.ZOConfig(lr=0.0, eps=EPS, device="cpu", **FORMATS[name])
            with zo2ext.offload(model, config) as zo:
                before = _flat(model.state_dict())
                for _ in range(DRIFT_STEPS):
                    zo.step(lambda: _loss(model, ids))
                after = _flat(model.state_dict())
        return float((after - before).norm() / before.norm())


def _flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def jobs() -> Iterator[tuple[str, Setting, int]]:
    """Every run, a seed of all formats after the other."""
    for seed in range(SEEDS):
        for setting in SETTINGS:
            for name in (*FORMATS, EAGER):
                yield name, setting, seed


def picture(content: timing.Json, path: Path) -> None:
    """Distance to fp32, a bar a format and a panel a setting."""
    from zo2ext.runs import plots

    canvas, (axes,) = plots.figure()
    names = [name for name in (*FORMATS, EAGER) if name != "fp32"]
    for i, setting in enumerate(SETTINGS):
        means = {}
        for name in (*names, "fp32"):
            losses = [
                r["loss"] for r in content["rows"] if (r["name"], r["lr"]) == (name, setting.lr)
            ]
            means[name] = fmean(losses) if losses else float("nan")
        gaps = [means[name] - means["fp32"] for name in names]
        at = [k + 0.4 * i for k in range(len(names))]
        axes.barh(at, gaps, height=0.38, color=f"C{i}", label=str(setting))
        for y, gap in zip(at, gaps, strict=True):
            if math.isnan(gap):
                axes.text(0, y, "  not run", va="center", color=f"C{i}", fontsize="small")
    axes.set_yticks([k + 0.2 for k in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", lw=1)
    axes.set(xlabel="held-out loss above that of float32, nats a token")
    canvas.legend(loc="outside upper center", ncols=2, frameon=False)
    write_atomically(path, plots.png(canvas))


def main() -> None:
    parser = timing.argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=240, help="begin no run after this")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.out.is_file():
        content = json.loads(arguments.out.read_text())
    else:
        place = timing.environment(torch.device("cpu"))
        content = {"benchmark": "precision", "environment": place, "rows": [], "drift": {}}
    bench, end = Bench(arguments.data), time.monotonic() + 60 * arguments.minutes
    content.setdefault("start", bench.judge(bench.model))
    done = {(r["name"], r["lr"], r["seed"]) for r in content["rows"]}
    for name in (*FORMATS, EAGER):
        if name not in content["drift"]:
            content["drift"][name] = bench.drift(name)
    for name, setting, seed in jobs():
        if (name, setting.lr, seed) in done or time.monotonic() > end:
            continue
        row = {"name": name, "lr": setting.lr, "steps": setting.steps, "seed": seed}
        content["rows"].append(row | {"loss": bench.losses(name, setting, seed)})
        timing.write_json(arguments.out, content)
    print(f"from {content['start']:.3f}\n{timing.table(*precision_rows(content))}")
    if arguments.picture:
        picture(content, arguments.picture)


if __name__ == "__main__":
    main()
