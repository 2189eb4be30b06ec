"""What waits for the coordinator's acknowledgement, and in which order it goes."""

from peer.daemon.outbox import MAX_CERTIFICATES_PER_REPORT, Outbox
from protos.muster.v1 import common_pb2, rounds_pb2


def certificate(step: int, *, incarnation: int = 1, padding_bytes: int = 0) -> bytes:
    value = rounds_pb2.RoundValue(run_id="r", incarnation=incarnation, outer_step=step)
    return rounds_pb2.Certificate(
        value=value.SerializeToString(), contributions=b"x" * padding_bytes
    ).SerializeToString()


def test_certificates_go_in_order_and_stay_until_settled() -> None:
    outbox = Outbox()
    for step in (3, 1, 2, 2):
        outbox.add_certificate(certificate(step))
    assert outbox.num_certificates == 3
    assert [key for key, _ in outbox.next_report()] == [(1, 1), (1, 2), (1, 3)]
    outbox.settle_certificate((1, 2))
    assert [key for key, _ in outbox.next_report()] == [(1, 1), (1, 3)]
    assert outbox.oldest_step(1) == 1 and outbox.oldest_step(2) is None


def test_a_report_is_bounded_in_number_and_bytes() -> None:
    outbox = Outbox()
    for step in range(40):
        outbox.add_certificate(certificate(step))
    assert len(outbox.next_report()) == MAX_CERTIFICATES_PER_REPORT
    for step in range(40):
        outbox.add_certificate(certificate(step, padding_bytes=2**20))
    assert len(outbox.next_report()) == 1


def test_attestations_are_kept_once_until_acknowledged() -> None:
    outbox = Outbox()
    for payload in (b"a", b"b", b"a"):
        outbox.add_attestation(common_pb2.Signed(payload=payload).SerializeToString())
    sent = outbox.attestations()
    assert [signed.payload for signed in sent] == [b"a", b"b"]
    outbox.add_attestation(common_pb2.Signed(payload=b"c").SerializeToString())
    outbox.acknowledge_attestations(sent)
    assert [signed.payload for signed in outbox.attestations()] == [b"c"]
