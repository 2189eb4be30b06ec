"""What earlier trainers of a session have shown, so that the next is planned for what is left."""

from dataclasses import dataclass

from peer import session_events as ev


@dataclass(slots=True)
class TrainerLimits:
    """Grows tighter only."""

    max_micro_batch_sequences: int | None = None
    saves_memory: bool = False
    lost_devices: tuple[int, ...] = ()
    """Positions of devices whose local ranks ended or did not answer."""

    def lose(self, devices: tuple[int, ...]) -> None:
        """These are not counted on any more."""
        self.lost_devices = tuple(sorted({*self.lost_devices, *devices}))

    def learn_from(self, action: ev.Respawn) -> None:
        """What the session has decided after an out of memory."""
        if action.max_micro_batch_sequences is not None:
            self.max_micro_batch_sequences = action.max_micro_batch_sequences
        self.saves_memory = self.saves_memory or action.saves_memory
