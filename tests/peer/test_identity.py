"""Keys: made once, kept, refused when damaged, and accepted by p2pd's own parser."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from peer.identity import IDENTITY_KEY_NAME, P2P_KEY_NAME, Identity, load_identity
from protos.contract.errors import CorruptDataError
from protos.contract.ids import p2p_peer_id_from_public_key, peer_id_from_public_key


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return load_identity(tmp_path_factory.mktemp("home"))


def test_made_once_and_private(identity: Identity) -> None:
    home = identity.identity_key_path.parent
    again = load_identity(home)
    assert (
        again.peer_id
        == identity.peer_id
        == peer_id_from_public_key(identity.signing_key.public_key)
    )
    assert again.p2p_public_key == identity.p2p_public_key
    for name in (IDENTITY_KEY_NAME, P2P_KEY_NAME):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600


def test_p2p_key_signs_what_its_public_key_verifies(identity: Identity) -> None:
    der = identity.p2p_public_key[identity.p2p_public_key.index(b"\x30\x82") :]
    public_key = serialization.load_der_public_key(der)
    assert isinstance(public_key, rsa.RSAPublicKey)
    signature = identity.sign_with_p2p_key(b"nonce")
    public_key.verify(signature, b"nonce", padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.slow
def test_hivemind_reads_the_same_identity(identity: Identity) -> None:
    from hivemind.p2p import PeerID

    peer_id = PeerID.from_identity(identity.p2p_key_path.read_bytes())
    assert peer_id.to_base58() == p2p_peer_id_from_public_key(identity.p2p_public_key)


@pytest.mark.parametrize("name", [IDENTITY_KEY_NAME, P2P_KEY_NAME])
@pytest.mark.parametrize("damage", [b"", b"short", b"\x08\x00\x12\xff\xff\xff\xff\xff\xff\x01x"])
def test_a_damaged_key_is_never_replaced(
    tmp_path: Path, identity: Identity, name: str, damage: bytes
) -> None:
    for path in (identity.identity_key_path, identity.p2p_key_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CorruptDataError) as caught:
        load_identity(tmp_path)
    assert caught.value.remedy
    assert (tmp_path / name).read_bytes() == damage
