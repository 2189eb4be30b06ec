"""Words that both sides print alike."""


def counted(number: int, noun: str) -> str:
    """Number and noun, such as "1 peer" and "1,200 peers"; nouns whose plural has an s only."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
