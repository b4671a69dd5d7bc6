"""Write the text that the demo's language model is pretrained on, one paragraph a line.

    python scripts/make_demo_corpus.py demo_corpus.txt

`scripts/pretrain_demo_model.py` makes the same text in memory; this file is for looking at it.
The grammar is in zo2ext/demo/corpus.py. The same options write the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zo2ext.demo import corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--paragraphs", type=int, default=corpus.PARAGRAPHS, help="how many")
    parser.add_argument("--seed", type=int, default=corpus.SEED, help="of the grammar's choices")
    args = parser.parse_args()
    with args.out.open("w", encoding="ascii", newline="\n") as file:
        for paragraph in corpus.paragraphs(args.paragraphs, args.seed):
            file.write(paragraph + "\n")


if __name__ == "__main__":
    main()
