"""Which file system a path is on, and whether other machines may see it.

SQLite's write-ahead log needs memory that all its processes share, so it does not work over a
network; and the locks of network file systems are known to fail.
Source: https://www.sqlite.org/wal.html and https://www.sqlite.org/useovernet.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/mounts")
"""The table of mounted file systems on Linux."""

_NETWORK = frozenset(
    {
        "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs",
        "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2",
        "quobyte", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "webdav", "wekafs",
    }
)  # fmt: skip
"""File systems that another machine may have mounted as well."""
_LOCAL_FUSE = frozenset(
    {
        "bindfs", "cryfs", "encfs", "exfat", "ext2", "ext4", "fuse-overlayfs", "gocryptfs", "lxcfs",
        "mergerfs", "ntfs", "ntfs-3g", "portal", "unionfs", "unionfs-fuse", "zfs",
    }
)  # fmt: skip
"""Programs in user space that serve a disk of this machine; any other may serve a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A mounted file system."""

    kind: str
    """As the system names it: `ext4`, `nfs4`, `fuse.sshfs`."""
    mount: str
    """Where it is mounted."""

    @property
    def is_network(self) -> bool:
        """Whether other machines may write to it as well."""
        name, _, program = self.kind.partition(".")
        if name in ("fuse", "fuseblk"):
            return name == "fuse" and program not in _LOCAL_FUSE
        return self.kind in _NETWORK

    def __str__(self) -> str:
        return f"{self.kind} ({self.mount})"


def network_file_system(path: Path) -> FileSystem | None:
    """Returns the file system that a path is on, or would be, if it is one of a network."""
    found = file_system(path)
    return found if found is not None and found.is_network else None


def file_system(path: Path) -> FileSystem | None:
    """Returns the file system that a path is on, or would be; None where that cannot be known."""
    place = str(path.resolve())
    found = None
    for one in _mounted():
        mount = one.mount.rstrip("/")
        # Where two have the same place, the one that was mounted later is seen.
        is_above = place == mount or place.startswith(f"{mount}/")
        if is_above and (found is None or len(mount) >= len(found.mount.rstrip("/"))):
            found = one
    return found


def _mounted() -> Iterator[FileSystem]:
    """Yields mounted file systems, in the order they were mounted."""
    if MOUNTS.exists():
        try:
            lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            return
        for line in lines:
            _, mount, kind, *_ = (*line.split(" "), "", "", "")
            yield FileSystem(kind=kind, mount=_unescaped(mount))
        return
    import psutil

    for part in psutil.disk_partitions(all=True):
        yield FileSystem(kind=part.fstype.lower(), mount=part.mountpoint)


def _unescaped(text: str) -> str:
    """Returns a path of the table, in which blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
