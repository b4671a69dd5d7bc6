"""Steps of liangyuwang/zo2 on the shapes of step.py, from a checkout of it that you point to.

    python benchmarks/peers/zo2.py --zo2 PATH --shape opt-13b --batch 1 --length 2048

Needs a GPU and what that checkout needs (transformers 4.51.3 when this was written), so it may
want a Python of its own; it uses nothing of zo2ext. OPT and Qwen3 shapes: what the checkout
supports. None of its code is in this repository: it is imported from PATH and driven by its public
interface.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import SHAPES, make_config

DTYPES = ("float16", "bfloat16", "float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zo2", type=Path, required=True, metavar="PATH", help="the checkout")
    parser.add_argument(
        "--shape",
        choices=[shape for shape, (kind, _) in SHAPES.items() if kind in ("opt", "qwen3")],
        default="opt-1.3b",
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--resident", action="store_true", help="its mode without offloading")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def load(checkout: Path) -> Any:
    """The peer's package, or an exit that says why it cannot be had."""
    if not (checkout / "zo2" / "__init__.py").is_file():
        sys.exit(
            f"--zo2 must be a checkout of liangyuwang/zo2; there is no zo2 package in {checkout}"
        )
    sys.path.insert(0, str(checkout))
    try:
        import zo2
    except Exception as error:  # whatever its imports raise
        import transformers

        sys.exit(
            f"zo2 cannot be imported here ({type(error).__name__}: {error}); it is written for "
            f"transformers 4.51.3, this is {transformers.__version__}. Install its requirements "
            "into an environment of its own and run this script with that Python."
        )
    return zo2


def make_model(zo2: Any, options: argparse.Namespace) -> Any:
    """A model with random weights, as the peer's own documentation makes one."""
    import torch

    settings = zo2.ZOConfig(
        method="mezo-sgd",
        zo2=not options.resident,
        lr=1e-7,
        weight_decay=0.0,
        eps=1e-3,
        offloading_device="cpu",
        working_device="cuda:0",
    )
    kind = SHAPES[options.shape][0]
    torch.set_default_dtype(getattr(torch, options.dtype))
    with zo2.zo_hf_init(settings):
        import transformers

        name = {"opt": "OPTForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
        config = make_config(options.shape, length=options.length)
        config.tie_word_embeddings = False  # as in its own tests
        model = getattr(transformers, name)(config)
        model.zo_init(settings)
    if options.resident:
        model = model.to("cuda:0")
    torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    options = parse()
    zo2 = load(options.zo2)
    import torch
    import transformers

    if not torch.cuda.is_available():
        sys.exit("zo2 needs a CUDA GPU, and there is none here")
    torch.cuda.reset_peak_memory_stats()
    model = make_model(zo2, options)
    size = (options.batch, options.length)
    vocabulary = make_config(options.shape).vocab_size
    tokens = torch.randint(3, vocabulary, size, device="cuda:0")
    times = []
    for i in range(options.warmup + options.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.zo_train()
        model(input_ids=tokens, labels=tokens)
        torch.cuda.synchronize()
        if i >= options.warmup:
            times.append(time.perf_counter() - start)
    median = statistics.median(times)
    free, total = torch.cuda.mem_get_info()
    row = {
        "mode": "zo2, resident" if options.resident else "zo2",
        "shape": options.shape,
        "seconds": {
            "median": median,
            "minimum": min(times),
            "spread": (max(times) - min(times)) / median,
            "runs": len(times),
        },
        "tokens_s": tokens.numel() / median,
        "device_peak_bytes": torch.cuda.max_memory_allocated(),
        "device_used_bytes": total - free,
    }
    print(
        f"{row['mode']}, {options.shape}: median {median * 1e3:.1f} ms, minimum "
        f"{min(times) * 1e3:.1f} ms, {row['tokens_s']:.0f} tok/s"
    )
    if options.json:
        content = {
            "benchmark": "peer",
            "environment": {
                "device": "cuda",
                "gpu": {"name": torch.cuda.get_device_name()},
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "settings": {k: str(v) for k, v in vars(options).items() if k not in ("json", "zo2")},
            "rows": [row],
        }
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, options.json)


if __name__ == "__main__":
    main()
