"""Images as /dev/nbdN: the kernel's own NBD client, driven by its netlink interface or by qemu-nbd.

    system      what the kernel tells: the module, devices, partitions, mounts
    module      the nbd module: loading it so that partitions can appear
    netlink     connecting and disconnecting devices (generic netlink, family "nbd")
    backends    who answers for a device: a server of ours, or qemu-nbd
    records     which of the devices are ours; locks; the server's process
    attaching   an image becomes a device, its partitions are there, one is mounted
    detaching   all of that undone, and failures told

All of it needs root. Nothing here opens an image.
"""
