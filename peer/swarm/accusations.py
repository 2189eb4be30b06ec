"""Who is left out of the later groups of an outer step: members whose bytes broke the rules. Pure.

Only whoever reduces a piece sees what is wrong with it, and cannot prove it to others in a few
bytes. So an accusation is believed at once: it costs the accused its contribution to this step, not
its vote. Whoever accuses more members than may be bad (a third of all, and one) is taken for the
liar: it is left out and its accusations are void. And if nobody of a group would be left, everybody
is forgiven: better to try again than to stand still. Silence and broken streams have innocent
causes too: they are latecomers.py's business.
"""

from collections.abc import Collection


class Accusations:
    """Of one outer step, as one member knows them."""

    def __init__(self, *, num_members: int) -> None:
        self._most_bad = max(1, (num_members - 1) // 3)
        self._reasons: dict[str, dict[str, str]] = {}
        """accuser -> accused -> reason."""

    @property
    def left_out(self) -> frozenset[str]:
        """Members that no group takes in any more."""
        accused = {a for by_accused in self._reasons.values() for a in by_accused}
        found = {peer for peer in accused | set(self._reasons) if self.reason_against(peer)}
        return frozenset(found)

    def reason_against(self, peer_id: str) -> str:
        """Why a member is left out; empty if it is not."""
        if self._is_liar(peer_id):
            return f"it accused {', '.join(sorted(self._reasons[peer_id]))} in one outer step"
        for accuser, by_accused in self._reasons.items():
            if peer_id in by_accused and not self._is_liar(accuser):
                return f"{accuser} says: {by_accused[peer_id]}"
        return ""

    def _is_liar(self, peer_id: str) -> bool:
        return len(self._reasons.get(peer_id, ())) > self._most_bad

    def add(self, accuser: str, accused: str, reason: str, *, group: Collection[str]) -> None:
        """One member says that another has broken an attempt; `group` are those who brought
        something into it.
        """
        if accuser != accused:
            self._reasons.setdefault(accuser, {}).setdefault(accused, reason)
        if group and self.left_out.issuperset(group):
            self._reasons.clear()
