"""Mounts a CountingFileSystem; says "ready" and, in the end, as JSON, in which state that file system is.

Usage: MOUNTPOINT OPTIONS, where OPTIONS is a JSON object: read_only, slow, root_of_guest, uid_map, broken.
"""

from __future__ import annotations

import json
import os
import stat
import sys

from fusemount.owners import IdMap, Owners, id_range
from fusemount.serving import mount_and_serve
from fusemount.state import MountState
from fusemount.vfs import Tree
from tests.fusemount.counting_filesystem import CountingFileSystem


def content(uid: int, read_only: bool, slow: bool) -> CountingFileSystem:
    """Some files of the user's, some of root's."""
    fs = CountingFileSystem(read_only=read_only, slow=slow)
    fs.put("mine/text", b"some text\n" * 1000, 0o644, uid, uid)
    fs.put("roots/secret", b"secret", 0o600)
    fs.put("mine/link", "/roots/secret")
    fs.put("mine/set-id", b"#!/bin/sh", 0o6755, uid, uid)
    fs.put("many/0")
    for number in range(1, 500):
        fs.put(f"many/{number}", b"x" * number)
    for name in ("mine", "many"):
        fs._nodes[fs.inode(name)].uid = uid
    fs._nodes[fs.root].mode = stat.S_IFDIR | 0o777
    fs._nodes[fs.inode("roots")].mode = stat.S_IFDIR | 0o755
    return fs


def main() -> None:
    mountpoint, options = sys.argv[1], json.loads(sys.argv[2])
    uid = os.geteuid()
    fs = content(uid, options.get("read_only", False), options.get("slow", False))
    for path in options.get("broken", []):
        fs.broken.add(fs.inode(path))
    uids = IdMap(tuple(map(id_range, options.get("uid_map", []))))
    owners = Owners(uid, os.getegid(), options.get("root_of_guest", False), uids)
    kernel = {"nosuid", "nodev", "subtype=fusemount", "fsname=counting"}
    if not owners.root_of_guest:
        kernel.add("default_permissions")
    if fs.read_only:
        kernel.add("ro")
    tree = Tree(fs, fs, path=mountpoint)
    state = MountState()

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    mount_and_serve(tree, owners, state, mountpoint, kernel, lambda: print("ready", flush=True), log)
    tree.close()
    state.finish(None)
    end = {
        "files": {name.decode(): len(fs._nodes[inode].content) for name, inode in fs._nodes[fs.root].names.items()},
        "inodes": len(fs._nodes),
        "given": sum(fs.given.values()),
        "held": sum(fs.held.values()),
        "syncs": fs.syncs,
    }
    print(json.dumps(end))


main()
