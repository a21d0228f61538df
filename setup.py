"""Which folders become which packages. Everything else about the project is in pyproject.toml.

``kernels/`` and ``benchmarks/`` lie at the top of the repository and are installed inside the
package. In a checkout the symlinks ``fastdaa/kernels`` and ``fastdaa/benchmarks`` show the same
tree. Neither folder may hold an ``__init__.py``: from the repository root it would hide the
Hugging Face package ``kernels`` (tests/test_package.py).
"""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastdaa", "fastdaa.*"]),
        "fastdaa.kernels",
        "fastdaa.benchmarks",
        # Folders below benchmarks/, but for committed results.
        *(
            f"fastdaa.benchmarks.{name}"
            for name in find_namespace_packages("benchmarks", exclude=["results*", "*__pycache__"])
        ),
    ],
    package_dir={"fastdaa.kernels": "kernels", "fastdaa.benchmarks": "benchmarks"},
    include_package_data=False,  # MANIFEST.in lists more, for the source distribution
    package_data={
        "fastdaa": ["py.typed"],
        "fastdaa.kernels": ["README.md"],
        "fastdaa.benchmarks": ["README.md"],
        "fastdaa.benchmarks.step": ["README.md"],
    },
)
