"""What the two roles of the handshake tell each other, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbdserve.protocol.constants import BASE_ALLOCATION, DEFAULT_MAXIMUM_BLOCK, TransmissionFlags


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """One export, as NBD_OPT_INFO and NBD_OPT_GO describe it.

    Attributes:
        name: at most 4096 bytes of UTF-8; "" is the default export.
        size: bytes.
        flags: what the export can do. A server handshake itself adds HAS_FLAGS, and clears SEND_DF for a client
            without structured replies.
        description: a line for people, may be empty.
        minimum_block: bytes; every offset and length is a multiple of it. A power of two up to 65,536.
        preferred_block: bytes; a power of two, at least 512 and minimum_block.
        maximum_block: bytes; the largest payload of a read or write.
        contexts: names of the metadata contexts that a client may select.
    """

    name: str
    size: int
    flags: TransmissionFlags
    description: str = ""
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_block: int = DEFAULT_MAXIMUM_BLOCK
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)

    @property
    def has_default_sizes(self) -> bool:
        """Whether a client that never asked for the block sizes stays within them all the same."""
        return self.minimum_block == 1 and self.maximum_block >= DEFAULT_MAXIMUM_BLOCK


@dataclass(frozen=True, slots=True)
class Listing:
    """One entry of a server's NBD_OPT_LIST."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a finished handshake has settled, the same for both roles.

    Attributes:
        export: the export, with the flags that were really announced.
        structured: reads are answered in structured chunks.
        contexts: selected metadata contexts, id on the wire -> name.
        tls: the connection is encrypted.
    """

    export: ExportInfo
    structured: bool
    contexts: Mapping[int, str]
    tls: bool
