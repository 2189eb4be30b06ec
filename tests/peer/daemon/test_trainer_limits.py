"""What the daemon remembers of trainers that failed."""

from peer.daemon.children import TrainerLimits


def test_limits_only_grow_tighter() -> None:
    limits = TrainerLimits()
    limits.learn(max_micro_batch_sequences=4)
    limits.learn(lost_devices=(2,))
    limits.learn(saves_memory=True, lost_devices=(1, 2))
    limits.learn()
    assert limits == TrainerLimits(
        max_micro_batch_sequences=4, saves_memory=True, lost_devices=(1, 2)
    )
