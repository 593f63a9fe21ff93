"""Image locks: QEMU and we exclude each other as QEMU excludes itself."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from nbdserve import locking
from nbdserve.block import HostFile
from nbdserve.errors import Locked, OpenError
from nbdserve.opening import open_image
from tests.reference import needs, qemu_img_create, qemu_io, run
from tests.serving import Served, refusal

MIB = 1 << 20
FORMATS = ("raw", "qcow2")
ACCESSES = ("reader", "writer")

pytestmark = needs("qemu-img", "qemu-io", "qemu-system-x86_64")


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """One image of each format, with a pattern in it."""
    made = {format: qemu_img_create(tmp_path / f"disk.{format}", MIB, format) for format in FORMATS}
    for format, path in made.items():
        qemu_io(path, "write -P 7 0 1M", format=format)
    return made


# The users of an image: each a context that says whether it was let in


@contextmanager
def machine(image: Path, format: str, access: str) -> Iterator[bool]:
    """A virtual machine, stopped before its first instruction, with the image as its disk."""
    read_only = ",readonly=on" if access == "reader" else ""
    command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg", "-m", "16"]
    command += ["-qmp", "stdio", "-drive", f"if=virtio,format={format},file={image}{read_only}"]
    with subprocess.Popen(command, text=True, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            process.stdin.write('{"execute": "qmp_capabilities"}\n')
            process.stdin.flush()
            greeting, answer = process.stdout.readline(), process.stdout.readline()
            if greeting and answer:  # it answers once the disks are open
                yield True
            else:
                assert "Is another process using the image" in process.stderr.read()
                yield False
        finally:
            process.kill()


@contextmanager
def ours(image: Path, format: str, access: str) -> Iterator[bool]:
    """open_image(), which several descriptors in one process show as well as several processes."""
    with ExitStack() as stack:
        try:
            stack.enter_context(open_image(image, format=format, read_only=access == "reader"))
        except Locked:
            yield False
        else:
            yield True


USERS = {"QEMU": machine, "we": ours}


def both(first: str, second: str, image: Path, format: str, accesses: tuple[str, str]) -> bool:
    """Whether the second user is let in while the first one is there."""
    with USERS[first](image, format, accesses[0]) as entered:
        assert entered
        with USERS[second](image, format, accesses[1]) as admitted:
            return admitted


@pytest.mark.parametrize("second", ACCESSES)
@pytest.mark.parametrize("first", ACCESSES)
@pytest.mark.parametrize("format", FORMATS)
def test_as_qemu_excludes_itself(images: dict[str, Path], format: str, first: str, second: str) -> None:
    expected = both("QEMU", "QEMU", images[format], format, (first, second))
    assert expected == (first == second == "reader")
    for pair in (("QEMU", "we"), ("we", "QEMU"), ("we", "we")):
        assert both(*pair, images[format], format, (first, second)) == expected, pair


TOOLS = (
    "qemu-img info -f {format} {image}",
    "qemu-img info -U -f {format} {image}",
    "qemu-img check -f qcow2 {image}",
    "qemu-img convert -f {format} -O raw {image} {image}.copy",
    "qemu-img convert -U -f {format} -O raw {image} {image}.copy",
    "qemu-img convert -n -f raw -O {format} {other} {image}",
    "qemu-img create -q -f {format} {image} 1M",
    "qemu-img resize -f {format} {image} +1M",
    "qemu-img snapshot -c new {image}",
    "qemu-img rebase -u -f qcow2 -b {other} -F raw {image}",
    "qemu-io -r -f {format} -c 'read 0 512' {image}",
    "qemu-io -r -U -f {format} -c 'read 0 512' {image}",
    "qemu-io -f {format} -c 'write 0 512' {image}",
    "qemu-nbd -r --fork -t --pid-file {image}.pid -k {image}.socket -f {format} {image}",
    "qemu-nbd --fork -t --pid-file {image}.pid -k {image}.socket -f {format} {image}",
)


def succeeds(command: str, image: Path, format: str, other: Path) -> bool:
    words = shlex.split(command.format(image=image, format=format, other=other))
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    with suppress(FileNotFoundError):
        daemon = Path(f"{image}.pid")
        os.kill(int(daemon.read_text()), signal.SIGKILL)
        daemon.unlink()
    return result.returncode == 0


@needs("qemu-nbd")
@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_tool_fares_with_us_as_with_a_machine(
    images: dict[str, Path], tmp_path: Path, format: str, access: str
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB))
    tools = [tool for tool in TOOLS if format == "qcow2" or not ("qcow2" in tool or "snapshot" in tool)]
    outcomes = []
    for user in (machine, ours):
        with user(images[format], format, access) as entered:
            assert entered
            outcomes.append({tool: succeeds(tool, images[format], format, other) for tool in tools})
    assert outcomes[0] == outcomes[1]
    assert set(outcomes[0].values()) == {True, False}
    assert not outcomes[1]["qemu-io -f {format} -c 'write 0 512' {image}"]
    assert outcomes[1]["qemu-img info -U -f {format} {image}"]


# Backing files


@pytest.fixture
def overlays(images: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {
        format: qemu_img_create(tmp_path / f"on-{format}", None, backing_file=base, backing_fmt=format)
        for format, base in images.items()
    }


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_below_a_disk_may_be_read_but_not_written(
    images: dict[str, Path], overlays: dict[str, Path], format: str, access: str
) -> None:
    for user in (machine, ours):
        with user(overlays[format], "qcow2", access) as entered:
            assert entered
            for other in (machine, ours):
                with other(images[format], format, "reader") as admitted:
                    assert admitted
                with other(images[format], format, "writer") as admitted:
                    assert not admitted
            commit = subprocess.run(["qemu-img", "commit", "-q", overlays[format]], capture_output=True, text=True)
            assert "lock" in commit.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_many_disks_on_one_base(images: dict[str, Path], tmp_path: Path, format: str) -> None:
    with ExitStack() as stack:
        for number, user in enumerate((ours, machine, ours)):
            path = qemu_img_create(tmp_path / f"{number}", None, backing_file=images[format], backing_fmt=format)
            assert stack.enter_context(user(path, "qcow2", "writer"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_base_that_is_being_written(images: dict[str, Path], overlays: dict[str, Path], format: str) -> None:
    base = images[format]
    with machine(base, format, "writer") as entered:
        assert entered
        for read_only in (True, False):
            with pytest.raises(Locked, match=rf"^{base}: qemu-system-x86 \(process \d+\) is writing to it"):
                open_image(overlays[format], read_only=read_only)
        with open_image(overlays[format], read_only=True, force_share=True) as device:
            assert device.read(0, 512) == bytes([7]) * 512
    open_image(overlays[format]).close()


# The user's side


def test_a_running_machine_gives_one_clear_line(images: dict[str, Path], tmp_path: Path) -> None:
    image = images["qcow2"]
    with machine(image, "qcow2", "writer") as entered:
        assert entered
        for options in ((), ("-r",)):
            said = refusal(image, *options)
            assert said.startswith(f"{image}: qemu-system-x86 (process ")
            assert "is writing to it; stop that first" in said
            assert "--read-only --force-share" in said
        with Served(image, "-r", "-U", "-k", tmp_path / "socket") as server:
            run("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 1M", server.uri)
    with Served(image, "-k", tmp_path / "socket") as server:
        qemu_io(server.uri, "write -P 8 0 1M", format="raw")


def test_a_reader_that_stands_in_the_way(images: dict[str, Path]) -> None:
    image = images["raw"]
    with machine(image, "raw", "reader") as entered:
        assert entered
        said = refusal(image, "-f", "raw")
    assert "is using it and lets nobody write to it; stop that first, or open it read-only (-r)" in said


def test_the_user_is_named_by_its_number(images: dict[str, Path], tmp_path: Path) -> None:
    with Served(images["raw"], "-f", "raw", "-k", tmp_path / "socket") as server:
        assert f"(process {server.process.pid}) is writing to it" in refusal(images["raw"], "-f", "raw")


def test_a_lock_ends_with_its_process(images: dict[str, Path], tmp_path: Path) -> None:
    image = images["qcow2"]
    with Served(image, "-k", tmp_path / "socket") as server:
        with machine(image, "qcow2", "writer") as admitted:
            assert not admitted
        server.process.kill()
        server.process.wait()
        with machine(image, "qcow2", "writer") as admitted:
            assert admitted


@pytest.mark.parametrize("format", FORMATS)
def test_force_share_only_looks(images: dict[str, Path], format: str) -> None:
    with pytest.raises(OpenError, match=r"--force-share is only for looking at an image; open it read-only \(-r\)"):
        open_image(images[format], format=format, force_share=True)
    assert "read-only (-r)" in refusal(images[format], "--force-share")
    with open_image(images[format], format=format, read_only=True, force_share=True):
        for user in (machine, ours):
            with user(images[format], format, "writer") as admitted:
                assert admitted, "an onlooker is in nobody's way"


def test_force_share_goes_with_a_snapshot(images: dict[str, Path]) -> None:
    image = images["qcow2"]
    run("qemu-img", "snapshot", "-c", "before", str(image))
    with machine(image, "qcow2", "writer") as entered:
        assert entered
        with open_image(image, snapshot="before", force_share=True) as device:
            assert device.read(0, 512) == bytes([7]) * 512


@needs("losetup")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a loop device")
def test_block_devices_are_locked_too(images: dict[str, Path]) -> None:
    device = Path(run("losetup", "-f", "--show", images["raw"]).strip())
    try:
        for first in USERS:
            for second in USERS:
                assert both(first, second, device, "raw", ("reader", "reader"))
                assert not both(first, second, device, "raw", ("writer", "writer"))
                assert not both(first, second, device, "raw", ("reader", "writer"))
    finally:
        run("losetup", "-d", device)


# The locks themselves


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.raw"
    path.write_bytes(bytes(4096))
    return path


def test_locks_come_before_the_first_look(
    images: dict[str, Path], overlays: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before the lock might have been changed by whoever had the image until then."""
    locked: set[int] = set()
    lock, read_into = locking.lock, HostFile.read_into

    def locking_first(file: HostFile, claim: locking.Claim) -> bool:
        locked.add(id(file))
        return lock(file, claim)

    def reading(file: HostFile, offset: int, buffer: bytearray) -> None:
        assert id(file) in locked
        read_into(file, offset, buffer)

    monkeypatch.setattr(locking, "lock", locking_first)
    monkeypatch.setattr(HostFile, "read_into", reading)
    with open_image(overlays["qcow2"]) as device:
        assert device.read(0, 512) == bytes([7]) * 512
    assert len(locked) == 2


def test_of_many_who_come_at_once_at_most_one_enters(plain: Path) -> None:
    inside, most, entries = 0, 0, 0
    counting = threading.Lock()

    def come_and_go() -> None:
        nonlocal inside, most, entries
        for _ in range(25):
            file = HostFile.open(plain, writable=True)
            with suppress(Locked):
                locking.lock(file, locking.WRITER)
                with counting:
                    inside, entries = inside + 1, entries + 1
                    most = max(most, inside)
                os.sched_yield()
                with counting:
                    inside -= 1
            file.close()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entries > 0) == (1, True)


def test_a_file_that_a_program_has_locked_as_a_whole(plain: Path) -> None:
    with plain.open("r+b") as other:
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, locking._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        with pytest.raises(Locked, match=rf"^{plain}: another program has locked it for itself; stop that first$"):
            open_image(plain, format="raw")
    open_image(plain, format="raw").close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(plain: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    warnings: list[str] = []
    open_image(plain, format="raw", warn=warnings.append).close()
    assert len(warnings) == 1 and "no other program" in warnings[0]
    open_image(plain, format="raw", read_only=True, warn=pytest.fail).close()


def test_a_lock_server_that_fails(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OpenError, match=rf"^{plain}: Input/output error$"):
        open_image(plain, format="raw")
