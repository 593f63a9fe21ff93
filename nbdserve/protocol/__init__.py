"""The NBD wire, without I/O: bytes in, decisions out, for both roles.

Nothing here knows sockets, trio, images or devices; the arrows go to nbdserve.errors and the standard library only.
The specification is doc/proto.md of the NetworkBlockDevice project; docstrings name its sections.

A connection has two phases, and each role an object for each of them:

                    server                              client
    handshake       ServerHandshake                     ClientHandshake        -> Agreement
    transmission    RequestReader, replies (packing)    ReplyReader (packs requests, reads replies)

`handshake` opens with the theory of operation of the first phase, `transmission_server` and `transmission_client` with
that of the second. `constants` has every number of the wire, `messages` what the roles tell each other, `outstanding`
how a client judges a reply, `strings` the rules for names and texts. Import from these: a server has no use for the
client's half, and starts sooner without it.

ProtocolError always means that the connection must end. What fails only one request is the consumer's to decide; it
raises RequestError and answers with an error reply.
"""
