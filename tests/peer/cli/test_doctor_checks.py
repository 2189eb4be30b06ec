"""What the doctor says of the kernel's network settings: advice with the command, never a fault."""

from pathlib import Path

from peer.cli.doctor_checks import check_network


def _settings(folder: Path, control: str, wmem: str) -> Path:
    (folder / "tcp_congestion_control").write_text(control + "\n")
    (folder / "tcp_wmem").write_text(wmem + "\n")
    return folder


def test_defaults_get_advice(tmp_path: Path) -> None:
    check = check_network(settings_folder=_settings(tmp_path, "cubic", "4096\t16384\t4194304"))
    assert check.is_ok
    assert "sysctl -w net.ipv4.tcp_congestion_control=bbr" in check.found
    assert "tcp_wmem='4096 16384 33554432'" in check.found and "about 23 MB/s" in check.found


def test_good_settings_get_none(tmp_path: Path) -> None:
    check = check_network(settings_folder=_settings(tmp_path, "bbr", "4096 16384 33554432"))
    assert (
        check.found.startswith("TCP with bbr, send buffer up to ") and "sysctl" not in check.found
    )


def test_unreadable_settings_are_said_to_be_unknown(tmp_path: Path) -> None:
    assert "unknown" in check_network(settings_folder=tmp_path).found
