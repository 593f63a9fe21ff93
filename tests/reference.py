"""Thin wrappers of the tools that judge us: qemu-img, qemu-io, nbdinfo and their kin."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

needs = pytest.mark.needs
"""needs("qemu-img", ...): the programs a test calls. See tests/conftest.py for what happens without them."""


def run(*command: str | os.PathLike[str], stdin: str | None = None, timeout: float = 120) -> str:
    """Run a tool and return its standard output; a failure shows what it printed."""
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{command} -> {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def qemu_img_create(path: Path, size: int | str | None, format: str = "qcow2", **options: str | int) -> Path:
    """qemu-img create; options go into -o, except backing_file and backing_fmt (-b, -F)."""
    command: list[str | os.PathLike[str]] = ["qemu-img", "create", "-q", "-f", format]
    if "backing_file" in options:
        command += ["-b", str(options.pop("backing_file")), "-F", str(options.pop("backing_fmt"))]
    if options:
        command += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    command.append(path)
    if size is not None:
        command.append(str(size))
    run(*command)
    return path


def qemu_io(image: Path | str, *commands: str, format: str = "qcow2") -> str:
    """Run qemu-io commands on an image or an NBD URI."""
    arguments = [part for command in commands for part in ("-c", command)]
    return run("qemu-io", "-f", format, *arguments, str(image))


def qemu_content(image: Path, format: str, *options: str) -> bytearray:
    """The guest content as qemu-img reads it."""
    raw = image.with_name(image.name + ".reference")
    run("qemu-img", "convert", *options, "-f", format, "-O", "raw", str(image), str(raw))
    content = bytearray(raw.read_bytes())
    raw.unlink()
    return content


def qemu_map(image: Path, format: str) -> list[dict[str, Any]]:
    """qemu-img map --output=json."""
    extents: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", "-f", format, str(image)))
    return extents


def qemu_info(image: Path | str, format: str | None = None) -> dict[str, Any]:
    """qemu-img info --output=json."""
    chosen = ["-f", format] if format else []
    info: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", *chosen, str(image)))
    return info


def qemu_check(image: Path, *, leaks_allowed: bool = False) -> None:
    """qemu-img check finds nothing wrong with a qcow2 image (status 3 says leaked clusters and nothing worse)."""
    result = subprocess.run(["qemu-img", "check", "-f", "qcow2", image], capture_output=True, text=True)
    assert result.returncode in ((0, 3) if leaks_allowed else (0,)), result.stdout + result.stderr
