"""Write the journals in this folder: run once, with zo2ext 0.1.0, from an empty folder.

Never run this again with a later version: the files show that later versions read what 0.1.0 wrote.
Every run starts from the model that the package contains (zo2ext/demo/model), in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import zo2ext
from zo2ext.demo.corpus import paragraphs
from zo2ext.demo.task import MODEL_DIR

HERE = Path(__file__).parent
TEXT = [
    *("train", "--model=model", "--text=text.txt", "--out=run", "--device=cpu", "--steps=6"),
    *("--batch-size=2", "--seq-len=16", "--eval-windows=2", "--directions=2"),
    *("--weight-decay=0.1", "--lr=1e-4", "--seed=7"),
]
LOOP = {"lr": 1e-4, "seed": 7, "device": "cpu", "rounding": "stochastic", "write_back": 4}


def hashes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    found = {}
    for name, tensor in weights.items():
        content = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def keep(name: str, weights: Mapping[str, Tensor], how: str, *files: Path) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, folder / file.name)
    record = {"zo2ext": zo2ext.__version__, "how": how, "sha256": hashes(weights)}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 500, (12,), generator=generator) for _ in range(12)]
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def from_text() -> None:
    shutil.copytree(MODEL_DIR, "model", dirs_exist_ok=True)
    Path("text.txt").write_text("\n".join(paragraphs(100, seed=3)) + "\n")
    subprocess.run([sys.executable, "-m", "zo2ext", *TEXT], check=True)
    run = Path("run")
    weights = load_file(run / "final" / "model.safetensors")
    how = f"zo2ext {' '.join(TEXT)}"
    keep("text", weights, how, run / "journal.zo2", run / "arguments.json")


def from_trainer() -> None:
    arguments = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-4}
    arguments |= {"weight_decay": 0.1, "eps": 1e-3, "seed": 7, "use_cpu": True, "simulate": True}
    arguments |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True}
    how = f"ZOTrainer(args=ZOTrainingArguments('trainer', **{arguments}))"
    arguments["dataloader_pin_memory"] = False
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    training = zo2ext.ZOTrainingArguments("trainer", **arguments)
    trainer = zo2ext.ZOTrainer(model=model, args=training, train_dataset=rows())
    trainer.train()
    keep("trainer", model.state_dict(), how, Path("trainer/journal.zo2"))


def from_loop() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    config = zo2ext.ZOConfig(**LOOP, storage=torch.bfloat16)
    with zo2ext.offload(model, config, journal="loop.zo2") as zo:
        for row in rows()[:6]:
            batch = {name: tensor[None] for name, tensor in row.items()}
            zo.step(lambda batch=batch: model(**batch).loss)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = f"six steps of offload(model, ZOConfig(**{LOOP}, storage=torch.bfloat16), journal=...)"
    keep("loop", weights, how, Path("loop.zo2"))


if __name__ == "__main__":
    from_text()
    from_trainer()
    from_loop()
