"""nbdserve --make-certs: what TLS needs, made once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_certificate_options(group: argparse._ArgumentGroup) -> None:
    """The options of certificates that are made instead of an image that is served."""
    group.add_argument(
        "--make-certs",
        type=Path,
        metavar="DIR",
        help="write a certificate authority and certificates for --tls-certs; never writes over anything, "
        "and adds what is missing when called again",
    )
    group.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or address by which clients reach the server (may be repeated); default: localhost",
    )
    group.add_argument(
        "--client", action="append", default=[], metavar="NAME", help="one more client, in DIR/NAME (may be repeated)"
    )


def make(options: argparse.Namespace) -> None:
    """Do it, and say what is there now."""
    from nbdserve.certificates import make_certificates

    directory = options.make_certs
    made = make_certificates(directory, options.host, options.client)
    for file in made:
        print(file)
    if not made:
        print(f"{directory}: all was there already")
    elif directory / "ca-key.pem" in made:
        print(f"keep {directory / 'ca-key.pem'} to yourself: it makes clients; the server does not need it")
