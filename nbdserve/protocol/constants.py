"""The numbers of the NBD wire, named as the specification names them (doc/proto.md, section "Values").

Everything is big-endian on the wire. A prefix that the class name already says is dropped: NBD_OPT_GO is Option.GO.
Flags keep bits they do not know (IntFlag), because the specification tells most readers to ignore those.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC", the first eight bytes of every server
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT", newstyle greeting and every option
OLDSTYLE_MAGIC: Final = 0x00420281861253  # the greeting of a server too old for options
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

MAXIMUM_STRING: Final = 4096
"""Bytes; no string on the wire may be longer (section "Conventions")."""

DEFAULT_MAXIMUM_BLOCK: Final = 32 << 20
"""Bytes; the payload every peer may send unless told otherwise (section "Size constraints")."""

MAXIMUM_STATUS_DESCRIPTORS: Final = 1 << 20
"""The most extents of one block status chunk (section "Structured reply types")."""

EXPORT_NAME_ZEROES: Final = 124
"""Reserved bytes behind the answer to EXPORT_NAME, unless NO_ZEROES was agreed."""


class HandshakeFlags(IntFlag):
    """What the server's greeting offers (16 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlags(IntFlag):
    """What the client takes of it (32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlags(IntFlag):
    """What an export can do (16 bits)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """What a client may ask for during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


REPLY_ERROR_BIT: Final = 1 << 31
"""Set in every option reply type that is an error, known or not."""


class OptionReply(IntEnum):
    """How a server answers an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = REPLY_ERROR_BIT + 1
    ERR_POLICY = REPLY_ERROR_BIT + 2
    ERR_INVALID = REPLY_ERROR_BIT + 3
    ERR_PLATFORM = REPLY_ERROR_BIT + 4
    ERR_TLS_REQD = REPLY_ERROR_BIT + 5
    ERR_UNKNOWN = REPLY_ERROR_BIT + 6
    ERR_SHUTDOWN = REPLY_ERROR_BIT + 7
    ERR_BLOCK_SIZE_REQD = REPLY_ERROR_BIT + 8
    ERR_TOO_BIG = REPLY_ERROR_BIT + 9
    ERR_EXT_HEADER_REQD = REPLY_ERROR_BIT + 10


class Info(IntEnum):
    """The kinds of information behind INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """What a request asks for in the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlags(IntFlag):
    """How it is to be done (16 bits)."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ReplyFlags(IntFlag):
    """Flags of a structured reply chunk (16 bits)."""

    DONE = 1 << 0


CHUNK_ERROR_BIT: Final = 1 << 15
"""Set in every chunk type that is an error, known or not."""


class ChunkType(IntEnum):
    """Types of structured reply chunks (16 bits)."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = CHUNK_ERROR_BIT + 1
    ERROR_OFFSET = CHUNK_ERROR_BIT + 2


class ErrorCode(IntEnum):
    """The error values of replies; numbers of the wire, not of this host's errno."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


BASE_ALLOCATION: Final = "base:allocation"
"""The metadata context that the specification itself defines."""


class AllocationState(IntFlag):
    """Status flags of an extent in the context base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1
