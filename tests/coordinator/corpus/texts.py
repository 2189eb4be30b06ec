"""Small made-up texts, the same on every machine."""

import random
from pathlib import Path

_SENTENCE = (
    "the swarm trains a small model on borrowed machines and every token is counted once "
    "def return class lease window round quorum vote state digest peer chunk value item"
)
_WORDS = _SENTENCE.split()


def made_up_text(seed: int, *, num_words: int) -> str:
    """Lines of words and numbers."""
    generator = random.Random(seed)
    lines = []
    while num_words > 0:
        words = [generator.choice(_WORDS) for _ in range(min(num_words, generator.randint(3, 12)))]
        lines.append(" " * generator.choice((0, 4, 8)) + " ".join(words) + f" {num_words}")
        num_words -= len(words)
    return "\n".join(lines) + "\n"


def write_folder(folder: Path, *, num_files: int, num_words: int, first_seed: int = 0) -> Path:
    """A folder with `num_files` different text files in two subfolders."""
    for index in range(num_files):
        path = folder / ("even" if index % 2 == 0 else "odd") / f"text-{index:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made_up_text(first_seed + index, num_words=num_words + index))
    return folder
