"""For tools that need a setup.py; the settings are in pyproject.toml."""

import setuptools

setuptools.setup()
