"""The two packages and where they lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["megagrow", "megagrow.*"])
    + find_packages("kernels", include=["megagrow_kernels", "megagrow_kernels.*"]),
    package_dir={"megagrow_kernels": "kernels/megagrow_kernels"},
    package_data={"megagrow": ["py.typed"]},
)
