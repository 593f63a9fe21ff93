"""What is tested in a kernel of its own: runs there as the first process, on the host's tree, which it cannot change.

Every step prints its name before it starts; the first one that fails shows its traceback, and the guest ends.

Importing takes seconds under emulation, so that most commands, and the servers that they start, run in forks of this
process, which has imported what they need. The first step starts them as a user does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import nbdserve.partitions.mbr
import nbdserve.server.listen
import nbdserve.server.serving  # noqa: F401  (imported here once, for all forks)
from nbdserve.cli import attach as attach_command
from nbdserve.cli import serve as serve_command
from nbdserve.kernel import backends
from nbdserve.kernel.attaching import attach as attach_here
from nbdserve.kernel.backends import Request
from nbdserve.kernel.detaching import detach
from nbdserve.kernel.system import System
from nbdserve.opening import open_image

PART, BUSYBOX, IMAGES, DONE = sys.argv[1:]
RUN = Path("/run")
ATTACH = [sys.executable, "-m", "nbdserve.cli.attach"]


class Forked:
    """As subprocess.Popen, for the commands of this project: [python, "-m", module, *words] in a fork."""

    def __init__(self, command: Sequence[str], stdout: Any = None, stderr: Any = None, **_: Any) -> None:
        self.stdout: IO[bytes] | None = None
        fds = [stdout, stderr]
        if stdout == subprocess.PIPE:
            reading, fds[0] = os.pipe()
            self.stdout = os.fdopen(reading, "rb")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for fd, target in zip(fds, (1, 2), strict=True):
                os.dup2(target if fd is None else fd if isinstance(fd, int) else fd.fileno(), target)
            os.closerange(3, 100)
            self._run(command[2], command[3:])
        if stdout == subprocess.PIPE:
            os.close(fds[0])

    def _run(self, module: str, words: Sequence[str]) -> None:
        status = 70
        try:
            os.setsid()
            os.chdir("/")
            sys.argv = [module, *words]
            {"nbdserve": serve_command, "nbdserve.cli.attach": attach_command}[module].main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def attach(*words: str, fails: bool = False) -> str:
    """nbdattach; what it prints, or says when it fails."""
    with (RUN / "out").open("wb+") as out, (RUN / "err").open("wb+") as err:
        status = Forked([*ATTACH, *words], out, err).wait()
    printed, said = (RUN / "out").read_text(), (RUN / "err").read_text()
    assert (status != 0) == fails and "Traceback" not in said, f"{words}: {printed}{said}"
    if fails:
        assert printed == "" and len(said.splitlines()) == 1, (printed, said)
    return said if fails else printed


def attach_as_user(*words: str) -> str:
    return subprocess.run([*ATTACH, *words], check=True, capture_output=True, text=True).stdout


def listed() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(attach("--list", "--json"))
    return found


def names(printed: str) -> list[str]:
    return [line.split("\t")[0] for line in printed.splitlines() if line.startswith("/dev/")]


def free(name: str = "nbd0") -> bool:
    return Path(f"/sys/block/{name}/size").read_text() == "0\n" and not Path(f"/sys/block/{name}/pid").exists()


def copy(name: str) -> Path:
    target = RUN / name
    shutil.copy(Path(IMAGES) / name, target)
    return target


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


# The steps, in this order


def nothing_is_loaded() -> None:
    assert not Path("/sys/module/nbd").exists()
    plan = attach("--dry-run", str(copy("disk.qcow2")))
    assert plan.startswith("modprobe nbd max_part=16 nbds_max=16\nnbdserve "), plan
    assert not Path("/sys/module/nbd").exists()


def as_a_user_does() -> None:
    image = copy("disk.qcow2")
    assert attach_as_user(str(image)) == "/dev/nbd0\t20M\n/dev/nbd0p1\t8M\n/dev/nbd0p2\t8M\n"
    (found,) = listed()
    assert b"nbdserve" in Path(f"/proc/{found['pid']}/cmdline").read_bytes()
    attach_as_user("--detach", "/dev/nbd0")
    assert free()
    subprocess.run(["modprobe", "-r", "nbd"], check=True)
    from_now_on_in_forks()


def from_now_on_in_forks() -> None:
    open_image(str(copy("disk.qcow2"))).close()  # imports what the format needs
    backends.subprocess = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)  # type: ignore


def loaded_without_room_for_partitions() -> None:
    subprocess.run(["modprobe", "nbd", "max_part=0", "nbds_max=4"], check=True)
    assert Path("/sys/module/nbd/parameters/max_part").read_text() == "0\n"
    image = copy("disk.qcow2")
    subprocess.run(["qemu-nbd", "-c", "/dev/nbd1", "-r", image], check=True)
    said = attach(str(image), fails=True)
    assert "loaded with max_part=0" in said and "/dev/nbd1 is in use" in said, said
    subprocess.run(["qemu-nbd", "-d", "/dev/nbd1"], check=True)
    wait(lambda: free("nbd1"))
    assert names(attach(str(image))) == ["/dev/nbd0", "/dev/nbd0p1", "/dev/nbd0p2"]
    assert int(Path("/sys/module/nbd/parameters/max_part").read_text()) >= 16, "the kernel rounds it up"
    attach("--detach", "/dev/nbd0")


def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def twenty_times_native() -> None:
    with quick_programs():
        twenty_times("native", copy("disk.qcow2"))


def twenty_times_qemu() -> None:
    with quick_programs():
        twenty_times("qemu", copy("disk.qcow2"))


@contextmanager
def quick_programs() -> Iterator[None]:
    """busybox's mount and umount, which link no libraries; they do not have modules loaded."""
    folder = RUN / "quick"
    folder.mkdir()
    for name in ("mount", "umount"):
        (folder / name).symlink_to(BUSYBOX)
    subprocess.run(["modprobe", "ext4"], check=True)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def twenty_times(backend: str, image: Path) -> None:
    """The same device each time: a stale one would not be taken again."""
    folder = RUN / "mounted"
    folder.mkdir(exist_ok=True)
    for round_ in range(20):
        device = attach_here(Request(str(image)), backend, str(folder), 1, System(), tell)
        assert device.path == "/dev/nbd0"
        assert [partition.path for partition in device.partitions] == ["/dev/nbd0p1", "/dev/nbd0p2"]
        assert all(Path(partition.path).is_block_device() for partition in device.partitions)
        for earlier in range(round_):
            assert (folder / f"round {earlier}").read_text() == f"{earlier}\n" * 1000
        (folder / f"round {round_}").write_text(f"{round_}\n" * 1000)
        assert detach("nbd0", System()) == []
        assert free() and f" {folder} " not in mounts()
    assert listed() == []
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    assert not [path for path in RUN.joinpath("nbdserve").iterdir() if path.suffix != ".lock"]


def tell(line: str) -> None:
    print(f"told: {line}", flush=True)


def what_is_listed() -> None:
    image, folder = copy("disk.qcow2"), RUN / "mounted"
    assert "mounted at" in attach(str(image), "--mount", str(folder), "--partition", "2", "--device", "/dev/nbd3")
    assert "in use" in attach(str(image), "--backend", "qemu", "--device", "nbd3", fails=True)
    (found,) = listed()
    assert found["device"] == "/dev/nbd3" and found["image"] == str(image) and found["backend"] == "native"
    assert found["stale"] is False and Path(f"/proc/{found['pid']}").exists()
    parts = found["partitions"]
    assert isinstance(parts, list)
    assert [part["mounts"] for part in parts] == [[], [str(folder)]]
    assert "p2  " in attach("--list") and f"mounted at {folder}" in attach("--list")
    held = (folder / "held").open("w")
    assert "umount" in attach("--detach", "nbd3", fails=True), "busy: told, and nothing is torn off"
    assert not free("nbd3") and f" {folder} " in mounts()
    held.close()
    attach("--detach", "/dev/nbd3")
    assert free("nbd3") and listed() == []


def bad_requests() -> None:
    image = copy("disk.qcow2")
    assert "has several partitions: 1, 2" in attach(str(image), "--mount", "/run", fails=True)
    assert "has no partition 7; it has: 1, 2" in attach(str(image), "--partition", "7", fails=True)
    assert "no such directory" in attach(str(image), "--mount", "/run/none", fails=True)
    assert "No such file" in attach("/run/missing", fails=True)
    assert "is not connected" in attach("--detach", "nbd2", fails=True)
    assert "snapshot" in attach(str(image), "--snapshot", "none", fails=True)
    assert listed() == [] and free(), "nothing is left of what failed"
    assert not [path for path in RUN.joinpath("nbdserve").iterdir() if path.suffix != ".lock"]


def read_only_and_snapshots() -> None:
    image, folder = copy("snapshot.qcow2"), RUN / "mounted"
    before = image.read_bytes()
    for options in (["--read-only"], ["--snapshot", "earlier"]):
        for backend in ("native", "qemu"):
            attach(*options, "--backend", backend, str(image), "--mount", str(folder), "--partition", "1")
            assert (folder / "file").exists() == (options == ["--snapshot", "earlier"])
            assert listed()[0]["read_only"] is True
            attach("--detach", "--all")
    assert image.read_bytes() == before


def two_at_once() -> None:
    """Every one gets a device of its own."""
    for backend in ("qemu", "native"):
        images = [RUN / f"{number}.qcow2" for number in range(2)]
        for image in images:
            shutil.copy(Path(IMAGES) / "disk.qcow2", image)
        running = [Forked([*ATTACH, "--backend", backend, str(image)], subprocess.PIPE) for image in images]
        printed = [process.stdout.read().decode() for process in running if process.stdout is not None]
        assert [process.wait() for process in running] == [0, 0]
        assert {names(each)[0] for each in printed} == {"/dev/nbd0", "/dev/nbd1"}, printed
        assert {each["image"] for each in listed()} == {str(image) for image in images}
        attach("--detach", "--all")
        assert free("nbd0") and free("nbd1") and listed() == []


def a_dead_server() -> None:
    for backend in ("native", "qemu"):
        image, folder = copy("disk.qcow2"), RUN / "mounted"
        attach(str(image), "--backend", backend, "--mount", str(folder), "--partition", "1", "--timeout", "30")
        os.kill(int(str(listed()[0]["pid"])), signal.SIGKILL)
        wait(lambda: any(each["stale"] for each in listed()) or free())
        assert "stale" in attach("--list")
        started = time.monotonic()
        attach("--detach", "nbd0")
        assert time.monotonic() - started < 25, "nothing waits for the dead"
        assert free() and f" {folder} " not in mounts() and listed() == []


def a_server_that_hangs() -> None:
    """Nobody waits for it longer than was asked for."""
    attach(str(copy("disk.qcow2")), "--timeout", "2")
    server = int(str(listed()[0]["pid"]))
    os.kill(server, signal.SIGSTOP)
    reading = ["dd", "if=/dev/nbd0", "of=/dev/null", "bs=4k", "count=1", "skip=4000", "iflag=direct"]
    result = subprocess.run(reading, capture_output=True, timeout=60)
    assert result.returncode != 0 and b"Input/output error" in result.stderr, result
    os.kill(server, signal.SIGKILL)
    attach("--detach", "nbd0")
    assert free() and listed() == []


def a_server_that_comes_back() -> None:
    """Requests wait for it."""
    image, folder = copy("disk.qcow2"), RUN / "mounted"
    attach(str(image), "--mount", str(folder), "--partition", "1", "--timeout", "60")
    assert "server is alive" in attach("--reconnect", "nbd0", fails=True)
    (folder / "before").write_text("before")
    os.sync()
    os.kill(int(str(listed()[0]["pid"])), signal.SIGKILL)
    wait(lambda: listed()[0]["stale"] is True)
    writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={folder}/after", "bs=1M", "count=2", "oflag=direct"])
    attach("--reconnect", "/dev/nbd0")
    assert writer.wait(30) == 0 and listed()[0]["stale"] is False
    attach("--detach", "nbd0")
    attach(str(image), "--mount", str(folder), "--partition", "1", "--read-only")
    assert (folder / "before").read_text() == "before" and (folder / "after").stat().st_size == 2 << 20
    attach("--detach", "--all")
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def a_loop_device() -> None:
    image, folder = copy("disk.raw"), RUN / "mounted"
    subprocess.run(["modprobe", "loop"], check=True)  # udev would have made the node that loads it
    planned = attach("loop", "--dry-run", str(image), "2")
    assert planned == f"losetup --find --show --offset={9 << 20} --sizelimit={8 << 20} {image}\n"
    attach("loop", "--mount", str(folder), str(image), "2")
    assert (folder / "second").read_text() == "the second partition\n"
    subprocess.run(["umount", folder], check=True)
    device = attach("loop", str(image), "1").strip()
    assert int(Path(f"/sys/block/{Path(device).name}/size").read_text()) * 512 == 8 << 20
    subprocess.run(["losetup", "-d", device], check=True)
    assert "not a raw image" in attach("loop", str(copy("disk.qcow2")), "1", fails=True)


STEPS: dict[str, list[Callable[[], None]]] = {
    "native": [
        nothing_is_loaded,
        as_a_user_does,
        twenty_times_native,
        what_is_listed,
        bad_requests,
        a_server_that_hangs,
        a_server_that_comes_back,
    ],
    "both": [
        from_now_on_in_forks,
        loaded_without_room_for_partitions,
        twenty_times_qemu,
        read_only_and_snapshots,
        two_at_once,
        a_dead_server,
        a_loop_device,
    ],
}


def main() -> None:
    started = time.monotonic()
    try:
        for number, step in enumerate(STEPS[PART]):
            print(f"{time.monotonic() - started:6.1f} step {number} {step.__name__}", flush=True)
            step()
        print(f"{time.monotonic() - started:6.1f} {DONE}", flush=True)
    except BaseException:
        traceback.print_exc()
        log = subprocess.run([BUSYBOX, "dmesg"], capture_output=True, text=True).stdout
        print("\n".join(log.splitlines()[-15:]), flush=True)
    sys.stderr.flush()
    subprocess.run([BUSYBOX, "poweroff", "-f"])
    time.sleep(60)


if __name__ == "__main__":
    main()
