"""Everything but one thing is in pyproject.toml: a wheel carries configs/ as clbench/configs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package, but not for an editable install, which reads the checkout's."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib, "clbench", "configs")
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)  # files that are gone may be left of an earlier build
            shutil.copytree(Path(__file__).parent / "configs", target, ignore=shutil.ignore_patterns(".*"))


setup(cmdclass={"build_py": BuildWithConfigs})
