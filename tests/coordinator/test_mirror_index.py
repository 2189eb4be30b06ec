"""The index beside the checkpoints: signed, of the newest proved one, there after a restart."""

from pathlib import Path

from coordinator.mirror_index import MirrorIndex
from coordinator.operations.writer import Writer
from coordinator.store.rows_membership import CheckpointRow
from protos.contract.checkpoint_index import INDEX_NAME, CheckpointIndex
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld, digest_of


def test_the_index_names_the_newest_proved_checkpoint(tmp_path: Path) -> None:
    world = SwarmWorld.create(budget_windows=64)
    world.start(1)
    key = world.context.signing_key
    folder = tmp_path / "checkpoints" / RUN_ID
    folder.mkdir(parents=True)
    writer = Writer(world.store, context=world.context, clock=lambda: world.now).start()
    index = MirrorIndex(writer, data_dir=tmp_path, key=key)
    try:
        index.write_due()
        assert not list(folder.iterdir()), "nothing is proved yet"
        for step in (1, 2):
            world.commit(num_windows=2)
            world.attest()
            with world.store.write() as tx, tx.savepoint():
                tx.put_checkpoint(row(step))
            index.write_due()
            found = CheckpointIndex.opened(
                (folder / INDEX_NAME).read_bytes(), public_key=key.public_key, run_id=RUN_ID
            )
            assert found.outer_step == step and found.file_name == f"1-{step}.safetensors"
            assert found.state_digest == digest_of(1, step).hex()
        (folder / INDEX_NAME).unlink()
        index.write_due()
        assert not (folder / INDEX_NAME).exists(), "written when it changes"
        MirrorIndex(writer, data_dir=tmp_path, key=key).write_due()
        assert [path.name for path in folder.iterdir()] == [INDEX_NAME]
    finally:
        writer.stop()


def row(step: int) -> CheckpointRow:
    return CheckpointRow(
        run_id=RUN_ID,
        incarnation=1,
        outer_step=step,
        state_digest=digest_of(1, step),
        path=f"checkpoints/{RUN_ID}/1-{step}.safetensors",
        total_bytes=100,
        peer_id="p",
        store_unix_ms=step,
    )
