"""What the daemon remembers of trainers that failed."""

from peer import session_events as ev
from peer.daemon.trainer_limits import TrainerLimits


def test_limits_only_grow_tighter() -> None:
    limits = TrainerLimits()
    trainer = ev.ChildName.TRAINER
    limits.learn_from(ev.Respawn(child=trainer, reason="", max_micro_batch_sequences=4))
    limits.lose((2,))
    limits.learn_from(ev.Respawn(child=trainer, reason="", saves_memory=True))
    limits.lose((1, 2))
    limits.learn_from(ev.Respawn(child=trainer, reason=""))
    assert limits == TrainerLimits(
        max_micro_batch_sequences=4, saves_memory=True, lost_devices=(1, 2)
    )
