"""Builds the reference: ``make docs``."""

import importlib
import os
import subprocess
import sys

# Imported by autodoc and by the commands of cli.md, on CPUs wherever it is built.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "COLUMNS": "88"}

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from jax_gemma_arf import __version__

project = "jax_gemma_arf"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autosummary_generate = False  # tables in pages that are written by hand
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries = False
html_theme = "furo"
html_theme_options = {"light_css_variables": {"code-font-size": "72%"}}  # 100 columns fit a page
html_title = f"jax_gemma_arf {__version__}"
html_show_copyright = False


class Output(SphinxDirective):
    """Shows a command of this package and its output: ``{output} -m jax_gemma_arf --help``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Runs the command. The build fails if the command does."""
        (line,) = self.arguments
        command = [sys.executable, *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text = f"$ python {line}\n{done.stdout}"
        return [nodes.literal_block(text, text, language="text")]


def defining_module(app: Sphinx, module: str, attribute: str) -> str | None:
    """Returns the module with the source of a public function, which calls itself by another."""
    public = getattr(importlib.import_module(module), attribute.partition(".")[0], None)
    return getattr(public, "__globals__", {}).get("__name__")


def setup(app: Sphinx) -> None:
    """Registers the directive and the links to sources."""
    app.add_directive("output", Output)
    app.connect("viewcode-follow-imported", defining_module)
