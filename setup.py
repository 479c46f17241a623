"""Puts the recipes and DeepSpeed JSONs of this repository into the wheel. All else stands in pyproject.toml.

They stay in `recipes/` and `ds_configs/`, where people look for them and edit them; a wheel has them in
`eagle3_ds/shipped`, where eagle3_ds/config/shipped.py looks first. An editable install and a clone have no
such folder, and use the repository's own.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "ds_configs")


class BuildWithShipped(build_py):
    """`build_py` with the shipped files, which lie outside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, built in self._shipped().items():
                self.mkpath(str(Path(built).parent))
                self.copy_file(source, built)

    def get_source_files(self) -> list[str]:
        """What a source archive holds, too: with these, it builds the same wheel."""
        return [*super().get_source_files(), *self._shipped()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self._shipped().values()]

    def _shipped(self) -> dict[str, str]:
        """{file of the repository: its place in the build}."""
        return {
            str(path): str(Path(self.build_lib or "", "eagle3_ds", "shipped", path))
            for folder in SHIPPED
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }


setup(cmdclass={"build_py": BuildWithShipped})
