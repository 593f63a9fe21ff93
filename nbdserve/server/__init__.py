"""The trio edge: what turns devices into a running NBD server.

exports       names -> devices, and what each announces
requests      one request in, the bytes of its reply out; synchronous, for worker threads
replies       extents -> structured chunks and status descriptors, pure
transport     a socket, plain or encrypted, as the transmission loop wants it
transmission  the loop of one connection, with the fast path
connection    the handshake of one connection, with its deadline, then the loop
listen        listening sockets: TCP, unix, handed over by systemd or libnbd
serving       accepting, limits, and the orderly end
"""
