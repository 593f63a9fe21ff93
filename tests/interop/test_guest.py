"""A guest whose root disk lies on the server boots from it, writes to it and powers off."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.interop import guest
from tests.interop.certificates import Certificates
from tests.interop.conftest import Serve
from tests.reference import needs, qemu_check, run

pytestmark = needs("qemu-img", "qemu-system-x86_64")


@dataclass(frozen=True, slots=True)
class Machine:
    """What every boot has in common; the tests copy the disk before they write to it."""

    kernel: guest.Kernel
    initrd: Path
    disk: Path


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if reason := guest.what_is_missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    directory = tmp_path_factory.mktemp("machine")
    kernel = guest.find_kernel()
    assert kernel is not None
    made = Machine(kernel, directory / "initrd", directory / "disk.raw")
    guest.build_initrd(made.initrd, kernel)
    guest.build_root_disk(made.disk)
    return made


def raw(disk: Path, directory: Path) -> Path:
    image = directory / "image.raw"
    run("qemu-img", "convert", "-O", "raw", disk, image)
    return image


def compressed_qcow2(disk: Path, directory: Path) -> Path:
    image = directory / "image.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", disk, image)
    return image


def overlay_on_raw(disk: Path, directory: Path) -> Path:
    image = directory / "overlay.qcow2"
    run("qemu-img", "convert", "-O", "raw", disk, directory / "base.raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image)
    return image


@pytest.mark.parametrize("make_image", [overlay_on_raw, raw])
def test_a_guest_boots_from_the_server_over_tcp(
    make_image: Callable[[Path, Path], Path], machine: Machine, serve: Serve, tmp_path: Path
) -> None:
    image = make_image(machine.disk, tmp_path)

    with serve(image, "--format", image.suffix[1:]) as uri:
        guest.run_guest(machine.kernel, machine.initrd, ["-drive", drive(uri)], token="written-over-tcp")

    assert_guest_wrote(image, "written-over-tcp", machine, tmp_path)
    if make_image is overlay_on_raw:
        assert (tmp_path / "base.raw").read_bytes() == machine.disk.read_bytes()


def test_a_guest_boots_from_the_server_over_tls(
    machine: Machine, serve: Serve, certificates: Certificates, tmp_path: Path
) -> None:
    image = compressed_qcow2(machine.disk, tmp_path)
    credentials = f"tls-creds-x509,id=tls0,dir={certificates.good},endpoint=client"

    with serve(image, "--tls-certs", str(certificates.good), "--tls-verify-peer") as uri:
        disk = ["-object", credentials, "-drive", drive(uri) + ",tls-creds=tls0"]
        guest.run_guest(machine.kernel, machine.initrd, disk, token="written-over-tls")

    assert_guest_wrote(image, "written-over-tls", machine, tmp_path)


def drive(uri: str) -> str:
    """QEMU's short spelling of a virtio disk at an NBD URI, which a user would type; its discards reach the server."""
    parts = urlsplit(uri)
    return f"driver=nbd,host={parts.hostname},port={parts.port},if=virtio,discard=unmap"


def assert_guest_wrote(image: Path, token: str, machine: Machine, directory: Path) -> None:
    """The image is sound, the file system in it is sound, and it holds what the guest wrote into it."""
    if image.suffix == ".qcow2":
        qemu_check(image)
    written = directory / "written.raw"
    run("qemu-img", "convert", "-f", image.suffix[1:], "-O", "raw", image, written)
    guest.check_file_system(written)
    assert guest.read_file(written, "/token") == f"{token}\n".encode()
    assert guest.read_file(written, "/copy") == guest.read_file(machine.disk, "/bin/busybox")
