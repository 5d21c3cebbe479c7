import pytest
from served import fake_server


@pytest.fixture(scope="module")
def live():
    """A server of the fake engine, bytes for tokens, shared by the tests of a file."""
    with fake_server() as found:
        yield found
