"""The build backend of pyproject.toml: scikit-build-core builds the wheel, with what CMake builds.

setuptools makes an editable install. It takes the Python files from the tree and builds nothing:
the extension comes from the tree's build folder, see runner/python.
"""

from scikit_build_core.build import *  # noqa: F403
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    get_requires_for_build_editable,
    prepare_metadata_for_build_editable,
)
