from tests.backbones.conftest import load  # noqa: F401 - a fixture
