"""Copies google-deepmind/gemma without the gigabytes that model.apply does not need.

    python bench/gather_gemma.py FOLDER         # where the extra gemma is installed
    PYTHONPATH=FOLDER python bench/model.py     # on the GPU machine

The gemma package imports TensorFlow, grain and more at its top, for data sets and training. FOLDER
gets the pure-Python packages that a model and its sampler use (about 4 MB), and a sitecustomize.py
with stand-ins for the others where they are not installed: modules whose attributes are empty
classes, good for annotations and base classes and for nothing else. Packages that a JAX machine has
anyway (jax, flax, numpy, absl and the like) are not copied.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Pure Python, and not on a machine that has jax, flax, optax, orbax-checkpoint and jaxtyping.
COPIED = (
    "clu",
    "dialog",
    "etils",
    "gemma",
    "immutabledict",
    "kauldron",
    "lark",
    "ml_collections",
    "typeguard",
)

# Modules that are imported, but not used by a model. Stand-ins only where they are not installed.
STAND_INS = (
    "IPython",
    "cv2",
    "grain",
    "matplotlib",
    "mediapy",
    "pandas",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
)

# Replaced where they are installed, too: the first registers classes of grain, the second imports
# TensorFlow.
REPLACED = ("kauldron.data.iterators.pygrain_handler", "tensorboard")

SITECUSTOMIZE = f'''\
"""Stand-ins for packages that google-deepmind/gemma imports and a model does not use."""

import importlib.abc
import importlib.machinery
import sys
import types

PACKAGES = {STAND_INS!r}
REPLACED = {REPLACED!r}


class _Anything:
    """Is its own attributes, items, unions and results; as a base class it leaves no trace."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __getitem__(self, item):
        return self

    __or__ = __ror__ = __getitem__

    def __mro_entries__(self, bases):
        return ()

    def __instancecheck__(self, instance):
        return False


class _StandIn(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder(REPLACED))
sys.meta_path.append(_Finder(PACKAGES))  # asked last, so what is installed comes first
'''

CHECK = """
from gemma import gm
gm.nn.Gemma2_2B, gm.nn.Gemma3_4B, gm.nn.Gemma4_E2B, gm.text.Gemma4Sampler
import jax_gemma_arf.integrations.gemma
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies what a Gemma model needs into a folder.")
    parser.add_argument("folder", type=Path, help="where to; must not exist yet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    distributions = importlib.metadata.packages_distributions()
    for package in COPIED:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"{package} must be installed: pip install '.[gemma]'")
        shutil.copytree(
            Path(spec.origin).parent,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__", "*_test.py", "testdata"),
        )
        for name in distributions.get(package, ()):  # jaxtyping asks for typeguard's version
            distribution = importlib.metadata.distribution(name)
            info = folder / f"{name}-{distribution.version}.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {distribution.version}\n")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK], check=True, env=environment, cwd=folder
    )
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
