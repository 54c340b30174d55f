"""Copies a package of models without the gigabytes that running a model does not need.

    python bench/gather.py gemma FOLDER             # where the extra gemma is installed
    PYTHONPATH=FOLDER python bench/model.py         # on the GPU machine

    python bench/gather.py tunix FOLDER             # where the extra tunix is installed
    PYTHONPATH=FOLDER python bench/tunix_gemma.py   # on the GPU machine

The packages import TensorFlow, grain, pandas and more at their top, for data sets and logs. FOLDER
gets the pure-Python packages that the benchmark uses, a few MB, and a sitecustomize.py with
stand-ins for the others where they are not installed: modules whose attributes are empty classes,
good for annotations and base classes and for nothing else. Packages that a JAX machine has anyway
(jax, flax, optax, orbax-checkpoint, jaxtyping and what these need) are not copied.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Selection(NamedTuple):
    """Packages of one benchmark."""

    #: Pure Python, and not on a machine that has jax, flax, optax, orbax-checkpoint and jaxtyping.
    copied: tuple[str, ...]
    #: Modules that are imported, but not used. Stand-ins only where they are not installed.
    stand_ins: tuple[str, ...]
    #: Modules that are replaced where they are installed, too.
    replaced: tuple[str, ...]
    #: Imports what the benchmark does.
    check: str


SELECTIONS = {
    "gemma": Selection(
        copied=(
            "clu",
            "dialog",
            "etils",
            "gemma",
            "immutabledict",
            "kauldron",
            "lark",
            "ml_collections",
            "typeguard",
        ),
        stand_ins=(
            "IPython",
            "cv2",
            "grain",
            "matplotlib",
            "mediapy",
            "pandas",
            "sklearn",
            "tensorflow",
            "tensorflow_datasets",
        ),
        # The first registers classes of grain, the second imports TensorFlow.
        replaced=("kauldron.data.iterators.pygrain_handler", "tensorboard"),
        check="""
from gemma import gm
gm.nn.Gemma2_2B, gm.nn.Gemma3_4B, gm.nn.Gemma4_E2B, gm.text.Gemma4Sampler
import jax_gemma_arf.integrations.gemma
""",
    ),
    "tunix": Selection(
        copied=("einops", "tunix"),
        stand_ins=(
            "PIL",
            "huggingface_hub",
            "metrax",
            "pandas",
            "perfetto",
            "safetensors",
            "sentencepiece",
        ),
        replaced=(),
        check="""
from tunix.generate.sampler import Sampler
from tunix.models.gemma3.model import Gemma3
from tunix.models.gemma4.model import Gemma4
from tunix.sft.peft_trainer import PeftTrainer
import jax_gemma_arf.integrations.tunix
""",
    ),
}

STAND_INS = '''\
"""Stand-ins for packages that are imported and not used."""

import importlib.abc
import importlib.machinery
import sys
import types


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
        # Python asks modules for its own names; etils asks TensorFlow for __internal__.
        if name.startswith("__") and name != "__internal__":
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


'''

FINDERS = """
# The second is asked last, so what is installed comes first.
sys.meta_path.insert(0, _Finder({replaced!r}))
sys.meta_path.append(_Finder({stand_ins!r}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Copies what a benchmark needs into a folder.")
    parser.add_argument("selection", choices=SELECTIONS)
    parser.add_argument("folder", type=Path, help="where to; must not exist yet")
    arguments = parser.parse_args()
    selection, folder = SELECTIONS[arguments.selection], arguments.folder
    folder.mkdir(parents=True)
    finders = FINDERS.format(replaced=selection.replaced, stand_ins=selection.stand_ins)
    (folder / "sitecustomize.py").write_text(STAND_INS + finders)
    distributions = importlib.metadata.packages_distributions()
    for package in selection.copied:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            sys.exit(f"{package} must be installed: pip install '.[{arguments.selection}]'")
        shutil.copytree(
            Path(spec.origin).parent,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__", "*_test.py", "testdata"),
        )
        for name in distributions.get(package, ()):  # some ask for the version of a package
            version = importlib.metadata.version(name)
            info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", selection.check],
        check=True,
        env=environment,
        cwd=folder,
    )
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
