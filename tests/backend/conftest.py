import os
from collections.abc import Iterator

import pytest

from tests.backend.cases import CASES, Stand, open_files
from tests.backend.device import Device


@pytest.fixture(autouse=True, scope="session")
def _close_files() -> Iterator[None]:
    yield
    while open_files:
        os.close(open_files.pop())


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def module_stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    case, folder = request.param, tmp_path_factory.mktemp("case")
    server = case.serve(folder).start() if case.serve is not None else None
    yield Stand(case, folder)
    if server is not None:
        server.stop()


@pytest.fixture
def stand(module_stand: Stand) -> Iterator[Stand]:
    yield module_stand
    while module_stand.devices:
        module_stand.devices.pop().close()


@pytest.fixture
def device(stand: Stand) -> Device:
    return stand.device()
