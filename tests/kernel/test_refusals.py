"""Where the kernel's devices cannot be used: one line that says what is missing, and what needs none of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbdserve.kernel import attaching, backends, module, netlink
from nbdserve.kernel.backends import Request
from nbdserve.kernel.records import Process, Record, Records
from nbdserve.kernel.system import Device, KernelError, Mount, Partition, System, Unavailable
from tests.reference import needs

INSTEAD = "; 'fusemount IMAGE DIR' needs none of this"


class Host(System):
    """A host with a /sys and a /proc of our own making."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.write("proc/self/mountinfo", "")

    def write(self, name: str, content: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n" if content else "")

    def load(self, max_part: int) -> None:
        self.write("sys/module/nbd/parameters/max_part", str(max_part))

    def add(self, name: str, size: int = 0, pid: int | None = None) -> None:
        number = name.removeprefix("nbd")
        self.write(f"sys/block/{name}/size", str(size // 512))
        self.write(f"sys/block/{name}/dev", f"43:{int(number) * 32}")
        self.write(f"sys/block/{name}/ro", "0")
        if pid is not None:
            self.write(f"sys/block/{name}/pid", str(pid))

    def add_partition(self, disk: str, number: int, start: int, size: int) -> None:
        folder = f"sys/block/{disk}/{disk}p{number}"
        for name, value in (("partition", number), ("start", start // 512), ("size", size // 512)):
            self.write(f"{folder}/{name}", str(value))
        self.write(f"{folder}/dev", f"43:{number}")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)


def nbdattach(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nbdserve.cli.attach", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_without_root(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="only root may use the kernel's NBD devices") as caught:
        attaching.attach(Request("/disk.raw"), None, None, None, host, print)
    assert str(caught.value).endswith(INSTEAD)


@pytest.mark.usefixtures("root")
def test_without_modprobe(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_program", lambda name: None)
    with pytest.raises(Unavailable, match=r"nbd is not loaded, and there is no modprobe .*fusemount"):
        module.prepare(host)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("container", [False, True])
def test_without_the_module(host: Host, container: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_program", lambda name: "/bin/false")
    monkeypatch.setattr("nbdserve.kernel.system.find_program", lambda name: "/bin/false")
    monkeypatch.setattr(module, "in_container", lambda: container)
    with pytest.raises(Unavailable, match="'modprobe nbd max_part=16 nbds_max=16' failed") as caught:
        module.prepare(host)
    assert ("in a container the host has to load it" in str(caught.value)) == container
    assert str(caught.value).endswith(INSTEAD)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("root")
def test_in_a_container_without_nodes(host: Host) -> None:
    if Path("/dev/nbd0").exists():
        pytest.skip("this machine has the device")
    host.load(max_part=31)
    with pytest.raises(Unavailable, match="/dev/nbd0 is not here"):
        module.prepare(host)


def test_netlink_without_the_family() -> None:
    if Path("/sys/module/nbd").exists():
        pytest.skip("this machine's kernel has it")
    with pytest.raises(Unavailable, match="out of reach here"):
        netlink.NbdNetlink()


# What has to be done to the module


def test_the_module_is_loaded_anew_only_if_that_hurts_nobody(host: Host) -> None:
    load = ["modprobe", "nbd", "max_part=16", "nbds_max=16"]
    assert module.preparation(host) == [load]
    host.load(max_part=0)
    host.add("nbd0")
    assert module.preparation(host) == [["modprobe", "-r", "nbd"], load]
    host.add("nbd1", size=1 << 20, pid=1)
    with pytest.raises(KernelError, match=r"loaded with max_part=0, .* while /dev/nbd1 is in use; detach that first"):
        module.preparation(host)
    host.load(max_part=15)
    assert module.preparation(host) == []


# What the kernel tells


def test_devices_in_the_order_of_their_numbers(host: Host) -> None:
    for number in (0, 2, 10, 1):
        host.add(f"nbd{number}", size=number << 20, pid=4711 if number == 2 else None)
    host.add_partition("nbd2", 5, 1 << 20, 512 << 10)
    host.add_partition("nbd2", 1, 512 << 10, 256 << 10)
    assert [device.name for device in host.devices()] == ["nbd0", "nbd1", "nbd2", "nbd10"]
    parts = (Partition("nbd2p1", 1, 512 << 10, 256 << 10), Partition("nbd2p5", 5, 1 << 20, 512 << 10))
    assert host.device("nbd2") == Device("nbd2", 2 << 20, 4711, False, "", parts)
    assert host.device("nbd3") is None


def test_mounts_are_found_by_number_and_by_name(host: Host) -> None:
    host.add("nbd0", size=1 << 20, pid=1)
    host.add_partition("nbd0", 1, 0, 512)
    host.add_partition("nbd0", 2, 512, 512)
    host.write(
        "proc/self/mountinfo",
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 43:1 / /mnt/with\\040blank rw,relatime shared:1 - ext4 /dev/root rw\n"
        "31 22 0:55 / /mnt/btrfs rw - btrfs /dev/nbd0p2 rw",
    )
    device = host.device("nbd0")
    assert device is not None
    assert host.mounts(device) == [Mount("/dev/nbd0p1", "/mnt/with blank"), Mount("/dev/nbd0p2", "/mnt/btrfs")]


def test_other_users_of_a_device(host: Host) -> None:
    host.add("nbd0", size=1 << 20, pid=1)
    host.add_partition("nbd0", 1, 0, 512)
    (host.root / "sys/block/nbd0/nbd0p1/holders/dm-3").mkdir(parents=True)
    host.write("proc/swaps", "Filename Type Size Used Priority\n/dev/nbd0 partition 1 0 -2\n/dev/sda2 partition 1 0 -2")
    device = host.device("nbd0")
    assert device is not None
    assert host.other_users(device) == ["dm-3", "swap"]


@pytest.mark.parametrize(
    ("number", "said"),
    [(None, "several partitions: 1, 5; choose one"), (2, "has no partition 2; it has: 1, 5")],
)
def test_which_partition_is_meant(number: int | None, said: str) -> None:
    parts = (Partition("nbd0p1", 1, 0, 512), Partition("nbd0p5", 5, 512, 512))
    device = Device("nbd0", 1024, 1, False, "", parts)
    with pytest.raises(KernelError, match=said):
        attaching.chosen(device, number)
    assert attaching.chosen(device, 5) is parts[1]
    whole = Device("nbd0", 1024, 1, False, "", ())
    assert attaching.chosen(whole, None) is whole


# Records


def test_records_come_back_and_tell_the_dead(tmp_path: Path) -> None:
    records = Records(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        server = Process.of(child.pid)
        assert server is not None and server.is_alive
        assert not Process(server.pid, server.started - 1).is_alive, "another process that had this number"
        record = Record("nbd0", "/disk.raw", "native", server, ("nbdserve", "/disk.raw"), 2, 60)
        with records.lock("nbd0") as ours:
            assert ours
            with records.lock("nbd0", wait=False) as twice:
                assert not twice
            records.put(record)
        assert records.get("nbd0") == record and records.get("nbd1") is None
        assert server.stop(10)
    assert not server.is_alive and server.stop(10)
    (tmp_path / "run/nbd0.json").write_text("{")
    with pytest.raises(KernelError, match=r"nbd0\.json: damaged"):
        records.get("nbd0")


@pytest.mark.parametrize("image", ["/missing/disk.raw", "nbd://localhost:1"])
def test_a_server_that_does_not_start_says_why(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "run")
    with pytest.raises(KernelError, match=image):
        backends.connect_native(Request(image), records, print)
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left of it"


def test_a_server_is_ended_when_the_kernel_refuses(tmp_path: Path) -> None:
    """Here there is no kernel to connect: the server was started and negotiated with by then."""
    if Path("/sys/module/nbd").exists():
        pytest.skip("this machine's kernel would connect it")
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(Unavailable):
        backends.connect_native(Request(str(image), format="raw"), Records(tmp_path / "run"), print)
    assert list((tmp_path / "run").iterdir()) == []


# The command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give an IMAGE, or one of --detach, --list and --reconnect"),
        (("--list", "disk.raw"), "give an IMAGE, or one of"),
        (("--detach",), "--detach takes a DEVICE or --all"),
        (("--detach", "nbd0", "--all"), "--detach takes a DEVICE or --all"),
        (("--detach", "/dev/sda"), "'/dev/sda' is no device; give one like /dev/nbd0"),
        (("--json", "disk.raw"), "--json belongs to --list"),
        (("--partition", "0", "disk.raw"), "'0' is no number from 1 on"),
    ],
)
def test_a_command_line_that_makes_no_sense(words: tuple[str, ...], said: str) -> None:
    result = nbdattach(*words)
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr


@needs("sfdisk")
def test_the_loop_line(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4 << 20))
    table = "label: dos\nstart=2048, size=2048\nstart=4096, size=1024\n"
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)
    result = nbdattach("loop", "--dry-run", "--read-only", "--mount", "/mnt", image, "2")
    assert result.stdout == f"mount -o loop,offset={2 << 20},sizelimit={512 << 10},ro {image} /mnt\n"
    result = nbdattach("loop", "--dry-run", image, "1")
    assert result.stdout == f"losetup --find --show --offset={1 << 20} --sizelimit={1 << 20} {image}\n"
    assert "no partition '3'" in nbdattach("loop", "--dry-run", image, "3").stderr
