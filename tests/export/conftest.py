from tests.export.environments import (  # noqa: F401
    addons_python,
    browser_example,
    converter_python,
)
