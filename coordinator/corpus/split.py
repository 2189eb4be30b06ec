"""Which text is held out, and in which order documents enter the chunks.

Sources of at least MIN_SPLIT_DOCUMENTS files hold out whole files: the files are ranked by size,
cut into as many strata as files are wanted, and one is drawn from each, so that the share of bytes
is close to the share of files. Smaller sources hold out the last part of each file, cut at a line
end. Draws and order come from a hash of (seed, purpose, text): file names and the place in the file
system do not matter.
"""

import hashlib
from dataclasses import dataclass

from coordinator.corpus.sources import Document, Source

MIN_SPLIT_DOCUMENTS = 20
"""Fewer documents, and 5 % of them would be less than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A document, or one side of a cut document, that belongs to one split."""

    document: Document
    is_heldout: bool
    tail_ratio: float = 0.0
    """0: the whole document; else it is cut before about this last share."""

    def load_text(self) -> str:
        """Read the part's text; may be empty for one side of a document that has only one line."""
        text = self.document.load_text()
        if not self.tail_ratio:
            return text
        cut = split_at_line(text, tail_ratio=self.tail_ratio)
        return text[cut:] if self.is_heldout else text[:cut]

    def line_numbers(self, text: str) -> range:
        """Lines of the document, whose text this is, that are the part's; from 1."""
        end = text.count("\n") + 2
        if not self.tail_ratio:
            return range(1, end)
        first_heldout = 1 + text.count("\n", 0, split_at_line(text, tail_ratio=self.tail_ratio))
        return range(first_heldout, end) if self.is_heldout else range(1, first_heldout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Parts of one source, each list in the order in which its chunks are filled."""

    training: tuple[Part, ...]
    heldout: tuple[Part, ...]


def split_source(source: Source, *, seed: int, heldout_ratio: float) -> Split:
    """Divide a source; the same texts, seed and ratio give the same division."""
    documents = sorted(source.documents, key=lambda d: order_key(d, seed=seed, purpose="order"))
    if len(documents) < MIN_SPLIT_DOCUMENTS:
        return Split(
            training=tuple(
                Part(document=d, is_heldout=False, tail_ratio=heldout_ratio) for d in documents
            ),
            heldout=tuple(
                Part(document=d, is_heldout=True, tail_ratio=heldout_ratio) for d in documents
            ),
        )
    heldout_digests = _draw(documents, seed=seed, heldout_ratio=heldout_ratio)
    parts = [Part(document=d, is_heldout=d.text_digest in heldout_digests) for d in documents]
    return Split(
        training=tuple(part for part in parts if not part.is_heldout),
        heldout=tuple(part for part in parts if part.is_heldout),
    )


def split_at_line(text: str, *, tail_ratio: float) -> int:
    """Where the last `tail_ratio` begins, moved to a line end; len(text) if there is one line."""
    aim = int(len(text) * (1 - tail_ratio))
    return text.rfind("\n", 0, aim) + 1 or text.find("\n") + 1 or len(text)


def order_key(document: Document, *, seed: int, purpose: str) -> bytes:
    """Sort key that shuffles documents; independent for each purpose."""
    tag = f"muster corpus 1\n{seed}\n{purpose}\n".encode()
    return hashlib.sha256(tag + document.text_digest).digest()


def _draw(documents: list[Document], *, seed: int, heldout_ratio: float) -> set[bytes]:
    """Text digests of the documents to hold out: one of each stratum of similar size."""
    num_heldout = max(1, round(len(documents) * heldout_ratio))
    ranked = sorted(documents, key=lambda d: (d.num_text_bytes, d.text_digest))
    drawn = set()
    for stratum in range(num_heldout):
        begin = stratum * len(ranked) // num_heldout
        end = (stratum + 1) * len(ranked) // num_heldout
        chosen = min(ranked[begin:end], key=lambda d: order_key(d, seed=seed, purpose="heldout"))
        drawn.add(chosen.text_digest)
    return drawn
