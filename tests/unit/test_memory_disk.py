"""DiskTier: blobs on disk, their bytes, their accounts and every way to fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elbowroom.errors import ConfigError, IntegrityError
from elbowroom.memory import Budget, Completion, DiskTier, Ledger, Part


def pieces(seed: int, *sizes: int) -> list[memoryview]:
    """Return random bytes in pieces."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, size, dtype=np.uint8).data for size in sizes]


def finish(tier: DiskTier, ticket: int) -> Completion:
    """Wait for one transfer, the only one."""
    (done,) = tier.poll(10.0)
    assert done.ticket == ticket
    return done


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "swap", 1 << 20)


def test_what_was_put_comes_back_in_other_pieces(tier: DiskTier):
    """Parts are written one behind the other and read back into any memory of their size, also in part."""
    views = pieces(1, *[40] * 1500, 7000)
    put = finish(tier, tier.submit_put("a", [views[:1500], views[1500:]]))
    assert (put.error, put.num_bytes, len(put.checksums)) == (None, 67_000, 2)
    first, second = np.zeros(60_000, dtype=np.uint8), np.zeros(7000, dtype=np.uint8)
    into = [Part(60_000, [second.data], put.checksums[1]), Part(0, [first.data], put.checksums[0])]
    assert finish(tier, tier.submit_get("a", into)).error is None
    assert first.tobytes() + second.tobytes() == b"".join(views)
    alone = np.zeros(7000, dtype=np.uint8)
    assert finish(tier, tier.submit_get("a", [Part(60_000, [alone.data], put.checksums[1])])).num_bytes == 7000
    assert alone.tobytes() == bytes(views[1500])
    tier.close()


def test_blob_is_written_again_from_any_byte_on(tier: DiskTier):
    """What lies before ``append_at`` stays; what lay behind is gone, from the disk and from the account."""
    one, two = pieces(2, 5000, 3000)
    old = finish(tier, tier.submit_put("a", [[one[:2000]], [one[2000:]]]))
    new = finish(tier, tier.submit_put("a", [[two]], append_at=2000))
    assert tier.usage().used_bytes == 5000 == sum(path.stat().st_size for path in tier.path.glob("*.kv"))
    into = np.zeros(5000, dtype=np.uint8)
    parts = [Part(0, [into[:2000].data], old.checksums[0]), Part(2000, [into[2000:].data], new.checksums[0])]
    assert finish(tier, tier.submit_get("a", parts)).error is None
    assert into.tobytes() == bytes(one[:2000]) + bytes(two)
    with pytest.raises(IntegrityError, match="nothing can be written from byte 5001"):
        tier.submit_put("a", [[two]], append_at=5001)
    tier.close()


def test_ledger_is_charged_and_the_capacity_holds(tmp_path: Path):
    """Bytes are charged when a put begins and given back by delete; what does not fit is refused."""
    ledger = Ledger(Budget({}))
    tier = DiskTier(tmp_path, 10_000, ledger)
    (view,) = pieces(3, 6000)
    finish(tier, tier.submit_put("a", [[view]]))
    refused = finish(tier, tier.submit_put("b", [[view]]))
    assert "swap on disk is full: 5.9 KiB more are needed, 3.9 KiB of 9.8 KiB" in (refused.error or "")
    assert (tier.contains("a"), tier.contains("b"), ledger.held("swap", "disk")) == (True, False, 6000)
    assert tier.delete("a") == 6000
    assert tier.delete("a") == 0
    assert ledger.held("swap", "disk") == 0
    assert not list(tier.path.glob("*.kv"))
    tier.close()


def test_full_disk_is_said_in_plain_words(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    """ENOSPC ends the transfer with an error, not the thread."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (view,) = pieces(4, 100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        done = finish(tier, tier.submit_put("a", [[view]]))
    assert "is full" in (done.error or "")
    assert str(tier.path) in (done.error or "")
    assert finish(tier, tier.submit_put("b", [[view]])).error is None
    tier.close()


def test_short_transfers_are_carried_on(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    """A system call that moves less than asked is followed by others."""
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: write(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:11]], at))
    views = pieces(5, 3, 50, 20)
    put = finish(tier, tier.submit_put("a", [views]))
    into = np.zeros(73, dtype=np.uint8)
    assert finish(tier, tier.submit_get("a", [Part(0, [into.data], put.checksums[0])])).error is None
    assert into.tobytes() == b"".join(views)
    tier.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_on_disk_is_found(tier: DiskTier, damage: str):
    """A flipped bit, a short file and a missing one each end a get with an error."""
    (view,) = pieces(6, 5000)
    put = finish(tier, tier.submit_put("a", [[view]]))
    (path,) = tier.path.glob("*.kv")
    content = bytearray(path.read_bytes())
    content[4321] ^= 4
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:4000])
    done = finish(tier, tier.submit_get("a", [Part(0, [np.zeros(5000, dtype=np.uint8).data], put.checksums[0])]))
    assert {"flip": "checksum", "cut": "cut off", "gone": "No such file"}[damage] in (done.error or "")
    tier.close()


def test_absent_blob_and_idle_tier(tier: DiskTier):
    """A get of nothing fails; poll with nothing under way returns at once, whatever its timeout."""
    assert "no object 'x'" in (finish(tier, tier.submit_get("x", [])).error or "")
    assert tier.poll(3600.0) == []
    tier.close()


def test_files_are_private_and_go_with_the_tier(tmp_path: Path):
    """Directory and files are closed to others; nothing is left behind, and a second close does nothing."""
    tier = DiskTier(tmp_path, 1 << 20)
    finish(tier, tier.submit_put("../a/b", [pieces(7, 10)]))
    (path,) = tier.path.glob("*.kv")
    assert (tier.path.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    tier.close()
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_directory_of_a_killed_process_is_removed_and_a_live_one_stays(tmp_path: Path):
    """SIGKILL leaves a directory; the next start removes it, but not that of a process that lives."""
    code = (
        "import os, sys, signal; from elbowroom.memory.private_dir import PrivateDirectory; from pathlib import Path\n"
        f"made = PrivateDirectory(Path({str(tmp_path)!r})); (made.path / '0.kv').write_bytes(b'x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    alive = DiskTier(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == [alive.path]
    other = DiskTier(tmp_path, 1000)
    assert sorted(tmp_path.iterdir()) == sorted([alive.path, other.path])
    alive.close()
    other.close()


def test_unusable_directory_is_refused(tmp_path: Path):
    """A file where the directory should be is a configuration error that names the option."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="--swap"):
        DiskTier(tmp_path / "file", 1000)
