"""An export of an NBD server as a BlockDevice: connect() is all that other rooms need."""

from nbdserve.client.device import RemoteDevice, connect
from nbdserve.client.uri import NbdUri, is_uri

__all__ = ["NbdUri", "RemoteDevice", "connect", "is_uri"]
