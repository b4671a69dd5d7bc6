"""Write text in the language of the packaged model, one paragraph per line.

    python scripts/make_demo_corpus.py pretraining.txt
    python scripts/make_demo_corpus.py reviews.txt --reviews 4000

The first is the text that the model was pretrained on. The second is something new to learn:
reviews followed by "would you recommend it ?" and the answer. The grammar is in
zo2ext/demo/corpus.py; the same options write the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zo2ext.demo import corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="text file to write")
    parser.add_argument("--paragraphs", type=int, default=corpus.PARAGRAPHS, help="number of them")
    parser.add_argument("--reviews", type=int, help="write this many reviews with answers instead")
    parser.add_argument("--seed", type=int, default=corpus.SEED, help="seed of the grammar")
    args = parser.parse_args()
    lines = corpus.paragraphs(args.paragraphs, args.seed)
    if args.reviews is not None:
        reviews = corpus.reviews(args.reviews, args.seed, "seen")
        lines = (f"{r.text} {corpus.QUESTION} {corpus.ANSWERS[r.mood]}" for r in reviews)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
