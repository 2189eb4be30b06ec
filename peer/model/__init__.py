"""The decoder and what belongs to it; `init` and `schedule` import no torch, the rest does."""
