"""What pyproject.toml cannot say: an editable install puts plain paths, of the packages' two folders.

Left to itself setuptools installs a finder, since there are two folders. Python asks a finder after its path, on which
the folder of a clone called `zerolite` is a package without code for who starts beside it: `import zerolite` would give
that one. A package with `__init__.py` on a plain path wins, and `kernels/`, without, hides no other `kernels`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import _StaticPth, editable_wheel

ROOT = Path(__file__).resolve().parent


class PlainPaths(editable_wheel):
    """Of setuptools' ways, the one that it takes for a single folder."""

    def _select_strategy(self, name, tag, build_lib):
        return _StaticPth(self.distribution, name, [ROOT, ROOT / "kernels"])


setup(cmdclass={"editable_wheel": PlainPaths})
