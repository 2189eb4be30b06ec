"""QUIC is tried where a pair fills TCP's buffer, taken where it is faster, and left when
it fails.
"""

from peer.swarm.route_choice import PairRoute, Route

FAT = {"rtt_seconds": 0.1, "bytes_per_second": 22e6}
THIN = {"rtt_seconds": 0.1, "bytes_per_second": 4e6}


def test_only_pairs_that_fill_a_buffer_are_probed() -> None:
    pair = PairRoute()
    assert not pair.note_round(**THIN)
    assert not pair.note_round(rtt_seconds=0.0005, bytes_per_second=200e6)
    assert pair.note_round(**FAT)
    assert not pair.note_round(**FAT)


def test_the_faster_way_is_taken_and_checked_again_in_time() -> None:
    pair = PairRoute()
    assert pair.note_round(**FAT)
    pair.note_probe(tcp_bytes_per_second=22e6, quic_bytes_per_second=50e6)
    assert pair.route is Route.QUIC and "50.0 MB/s over QUIC" in pair.reason
    probed = [pair.note_round(**THIN) for _ in range(100)]
    assert probed == [False] * 99 + [True]
    pair.note_probe(tcp_bytes_per_second=5e6, quic_bytes_per_second=0.5e6)
    assert pair.route is Route.TCP


def test_a_little_faster_is_not_worth_it() -> None:
    pair = PairRoute()
    pair.note_probe(tcp_bytes_per_second=20e6, quic_bytes_per_second=24e6)
    assert pair.route is Route.TCP


def test_a_failure_goes_back_to_tcp_for_a_while() -> None:
    pair = PairRoute()
    pair.note_round(**FAT)
    pair.note_probe(tcp_bytes_per_second=20e6, quic_bytes_per_second=50e6)
    pair.note_failure("no connection within 5 s")
    assert pair.route is Route.TCP
    assert not any(pair.note_round(**FAT) for _ in range(99))
