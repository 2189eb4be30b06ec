"""The sequence lock of the shared state: a reader sees a whole state or waits, whoever dies."""

import os
import signal
import threading

import numpy as np

from peer.shared_vectors import SharedVectors, StatePosition

NUM_VALUES = 1000


def position(outer_step: int) -> StatePosition:
    return StatePosition(
        incarnation=1, outer_step=outer_step, schedule_tokens=0, directive_number=1
    )


def write(vectors: SharedVectors, outer_step: int) -> None:
    with vectors.writing_state(position(outer_step)):
        vectors.params[:] = outer_step


def die_while_writing(vectors: SharedVectors) -> None:
    """A process that is killed with half of the state written."""
    pid = os.fork()
    if pid == 0:
        try:
            with vectors.writing_state(position(99)):
                vectors.params[: NUM_VALUES // 2] = 99
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_reader_gets_what_was_written() -> None:
    vectors = SharedVectors.create(NUM_VALUES)
    write(vectors, 3)
    target = np.empty(NUM_VALUES, dtype=np.float32)
    assert vectors.read_params(target).outer_step == 3
    assert (target == 3).all()
    vectors.close()


def test_a_part_is_of_the_state_that_was_asked_for() -> None:
    vectors = SharedVectors.create(NUM_VALUES)
    write(vectors, 3)
    target = np.empty(2, dtype=np.float32)
    state = vectors.read_position()
    assert vectors.read_part(slice(5, 7), target, of=state) and target.tolist() == [3, 3]
    write(vectors, 4)
    assert not vectors.read_part(slice(5, 7), target, of=state)
    vectors.close()


def test_a_writer_that_dies_leaves_no_torn_state_and_no_lock() -> None:
    """Its half state is never read; what its successor writes is, and so is everything later."""
    vectors = SharedVectors.create(NUM_VALUES)
    write(vectors, 1)
    for outer_step in (2, 3):
        die_while_writing(vectors)
        target = np.empty(NUM_VALUES, dtype=np.float32)
        seen: list[int] = []
        reader = threading.Thread(
            target=lambda target=target, seen=seen: seen.append(
                vectors.read_params(target).outer_step
            ),
            daemon=True,
        )
        reader.start()
        with vectors.writing_state(position(outer_step)):
            vectors.params[:] = -1
            reader.join(0.05)
            assert reader.is_alive(), "a state was read while it was being written"
            vectors.params[:] = outer_step
        reader.join(10)
        assert seen == [outer_step] and (target == outer_step).all()
    vectors.close()
