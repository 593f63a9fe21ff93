"""What the server's tests share: certificates, made once."""

from __future__ import annotations

import pytest

from tests.interop.certificates import Certificates, make_certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificate directories, good ones and bad ones."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))
