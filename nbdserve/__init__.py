"""Serve and mount virtual machine disk images without root.

The layout, by what a user would look for:

    opening      a name -> a device; the policy on what an image may refer to
    locking      image locks that exclude QEMU and are honoured by it
    block        what a disk is: extents, devices, windows
    formats      how qcow2, VHD and raw images map guest bytes
    partitions   MBR and GPT
    protocol     the NBD wire, without I/O
    server       the trio edge: connections, replies, transports
    tls          certificate directories -> ssl.SSLContext
    certificates an authority and what it signs, in the layout that tls reads
    kernel       images as /dev/nbdN, through the kernel's own client
    cli          the commands, and the only code that prints

Everything but server and cli is plain synchronous, thread-safe Python.
"""

__version__ = "0.1.0"
