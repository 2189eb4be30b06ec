"""Which local rank is at fault, from what all of them do after a failure."""

import pytest

from peer.ipc import Message
from peer.parallel.ranks import judge

SYMPTOM: Message = {"kind": "failed", "reason": "RuntimeError: Connection closed by peer"}
NO_MEMORY: Message = SYMPTOM | {"is_out_of_memory": True, "reason": "MemoryError"}
NO_DEVICE: Message = SYMPTOM | {"is_device_lost": True, "reason": "GPU is lost"}


@pytest.mark.parametrize(
    ("found", "lost", "has_no_memory", "words"),
    [
        ({1: SYMPTOM, 2: -9}, [2], False, "local rank 2 was ended by signal 9"),
        ({1: None, 2: SYMPTOM}, [1], False, "local rank 1 does not answer"),
        ({1: None, 2: -9, 3: None}, [2], False, "local rank 2 was ended by signal 9"),
        ({1: None, 2: NO_DEVICE}, [2], False, "local rank 2 has lost its device: GPU is lost"),
        ({1: -6, 2: NO_MEMORY}, [], True, "local rank 2 is out of memory"),
        ({1: 127, 2: SYMPTOM}, [], True, "local rank 1 is out of memory"),
        ({1: SYMPTOM, 2: SYMPTOM}, [], False, ""),
    ],
)
def test_the_rank_at_fault(
    found: dict[int, Message | int | None], lost: list[int], has_no_memory: bool, words: str
) -> None:
    reasons, lost_ranks, is_memory = judge(found, during="run")
    assert (lost_ranks, is_memory) == (lost, has_no_memory)
    assert words in "; ".join(reasons)
