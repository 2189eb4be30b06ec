"""A process ends at once when everything is closed, and nothing that it said is lost."""

import subprocess
import sys

PROGRAM = """
import atexit, sys
from peer.parent_death import end_process
atexit.register(print, "the interpreter's farewell")
sys.stdout.write("last words")
sys.stderr.write("and warnings")
end_process(3)
"""


def test_what_was_written_is_there_and_no_farewell() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "last words", "and warnings")
