"""From an image to the tree that is mounted: what goes where, and the order in which all is closed again.

Closing: the file systems first (they write what they still hold), then their caches, then the image. A failure on the
way stops none of the later steps, and the first one is what the user hears of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusemount.filesystems.base import FileSystem
from fusemount.filesystems.files import DeviceFiles
from fusemount.vfs import ROOT, Hasty, Tree
from fusemount.volumes import Opened, Volume, Warn, open_volume, overlapping, read_volumes, select
from nbdserve.block import BlockDevice, Window
from nbdserve.errors import NbdserveError, OpenError
from nbdserve.partitions import PartitionTable


@dataclass(frozen=True, slots=True)
class View:
    """What of an image is to be seen, and how.

    Attributes:
        name: the image's, for messages.
        writable: change the image.
        partition: only this one; see volumes.select().
        raw: the disk and its partitions as files.
        inspect: the guest's root, with what its fstab mounts.
        raw_links: symbolic links as they are stored.
        path: the mount point.
    """

    name: str
    writable: bool = False
    partition: str | None = None
    raw: bool = False
    inspect: bool = False
    raw_links: bool = False
    path: str = "/"


@dataclass
class Assembly:
    """A tree, and everything below it.

    Args:
        device: the image, closed with the assembly.
        warn: told, in one line each, what the user should know.

    Raises:
        OpenError: there is nothing to show. The image is closed then.
    """

    device: BlockDevice
    view: View
    warn: Warn
    tree: Tree = field(init=False)

    def __post_init__(self) -> None:
        self._opened: list[Opened] = []
        try:
            self.tree = self._assemble()
        except BaseException:
            for opened in self._opened:
                _attempt(opened.fs.close)
            self._close_devices()
            raise

    def close(self) -> None:
        """Write everything and close the image; raises the first failure in the end."""
        failure = _attempt(self.tree.close)
        failure = failure or self._close_devices()
        if failure is not None:
            raise failure

    def _close_devices(self) -> Exception | None:
        caches = [opened.cache for opened in self._opened if opened.cache is not None]
        failures = [_attempt(device.close) for device in (*caches, self.device)]
        return next((failure for failure in failures if failure is not None), None)

    def _assemble(self) -> Tree:
        view = self.view
        try:
            table, volumes = read_volumes(self.device, self._told)
            self._unsafe = overlapping(volumes) if view.writable and not view.raw else set()
            if view.raw:
                return self._raw(table, volumes)
            if view.inspect:
                return self._guest(table, volumes)
            if view.partition is not None:
                return self._single(select(table, volumes, view.partition))
            if len(volumes) == 1 and volumes[0].partition is None:
                return self._single(volumes[0])
            return self._all(volumes)
        except NbdserveError as error:
            raise type(error)(f"{view.name}: {error}") from None

    def _told(self, line: str) -> None:
        self.warn(f"{self.view.name}: {line}")

    def _tree(self, fs: FileSystem, hasty: Hasty) -> Tree:
        return Tree(fs, hasty, path=self.view.path, raw_links=self.view.raw_links)

    def _open(self, volume: Volume, *, strictly: bool = False) -> Opened:
        """Open a volume as the view wants it; read-only, with a warning, where writing is not possible.

        Args:
            strictly: then refuse.
        """
        writable = self.view.writable and volume.condition.readable
        why_not = self._why_not_writable(volume) if writable else ""
        if why_not and strictly:
            raise OpenError(f"{volume.name} cannot be written: {why_not}; mount it without --rw")
        try:
            opened = open_volume(volume, writable=writable and not why_not)
        except OpenError as error:
            raise type(error)(f"{volume.name}: {error}") from None
        if why_not:
            self._told(f"{volume.name} is mounted read-only: {why_not}")
        self._opened.append(opened)
        return opened

    def _why_not_writable(self, volume: Volume) -> str:
        if volume.name in self._unsafe:
            return "it overlaps another partition"
        return "" if volume.condition.writable else volume.condition.remark

    def _raw(self, table: PartitionTable, volumes: list[Volume]) -> Tree:
        if self.view.partition is not None:
            chosen = select(table, volumes, self.view.partition)
            files = {chosen.name: chosen.device}
        else:
            files = {"disk": self.device} | {each.name: each.device for each in volumes if each.partition}
        fs = DeviceFiles(files)
        return self._tree(fs, fs)

    def _single(self, volume: Volume) -> Tree:
        opened = self._open(volume, strictly=True)
        return self._tree(opened.fs, opened.hasty)

    def _all(self, volumes: list[Volume]) -> Tree:
        """A folder for each partition; a file, which cannot be written, for one that cannot be opened."""
        opened: dict[str, Opened] = {}
        files: dict[str, BlockDevice] = {}
        for each in volumes:
            try:
                opened[each.name] = self._open(each)
            except OpenError as error:
                if each.kind and each.kind != "swap":
                    self._told(f"{error}")
                files[each.name] = _protected(each)
        if not volumes:
            raise OpenError("the partition table is empty; --raw shows the disk as a file")
        root = DeviceFiles(files, list(opened))
        tree = self._tree(root, root)
        for name, (fs, hasty, _) in opened.items():
            directory = tree.members[0].node(root.directory(name))
            tree.mount(ROOT, directory, fs, hasty, name=name.encode())
        return tree

    def _guest(self, table: PartitionTable, volumes: list[Volume]) -> Tree:
        if self.view.partition is not None:
            root = select(table, volumes, self.view.partition)
        else:
            root = self._find_root(volumes)
        from fusemount import guest

        tree = self._single(root)
        guest.mount_fstab(tree, root, volumes, self._open, self._told)
        return tree

    def _find_root(self, volumes: list[Volume]) -> Volume:
        from fusemount import guest

        roots = []
        for each in volumes:
            try:
                fs = open_volume(each, writable=False).fs
            except OpenError:
                continue
            if guest.looks_like_root(fs):
                roots.append(each)
            fs.close()
        if not roots:
            seen = ", ".join(f"{each.name} {each.kind or 'unknown'}" for each in volumes) or "nothing"
            raise OpenError(f"no guest's root file system found (there is: {seen}); name it with --partition")
        if len(roots) > 1:
            others = ", ".join(each.name for each in roots[1:])
            self._told(f"showing the guest on {roots[0].name}; there is another on {others} (--partition chooses)")
        return roots[0]


def _protected(volume: Volume) -> BlockDevice:
    """The bytes of a volume that is not to be written by accident."""
    window = Window(volume.device, 0, volume.size)
    window.read_only = True
    return window


def _attempt(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None
