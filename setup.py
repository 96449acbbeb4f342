"""For tools that ask for a setup.py: all is in pyproject.toml."""

import setuptools

setuptools.setup()
