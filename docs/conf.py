"""Builds the site: `sphinx-build -W docs site`.  Guide pages are docs/*.md; docs/api has a page per public module."""

import re

import adderops

project = "adderops"
copyright = "adderops developers"
release = adderops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
smartquotes_action = "D"  # dashes alone: quotes are those of code
default_role = "py:obj"  # `name` in a docstring links to its entry, where there is one
myst_heading_anchors = 3  # the anchors that GitHub makes
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_custom_sections = [("Class attributes", "params_style")]
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"adderops {release}"


def escaped(text: str) -> str:
    """Text as it reads outside of `code`: |x - w| and 2*padding have no markup, --option is code."""
    parts = re.split(r"(`+[^`]*`+)", text)
    plain = (re.sub(r"([|*])", r"\\\1", re.sub(r"(--\w[\w-]*)", r"``\1``", part)) for part in parts)
    return "".join(part if part[:1] == "`" else text for part, text in zip(parts, plain, strict=True))


def docstring_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Translates docstrings, which are written for `help()`, and adds the help of the fields of an options class.

    A block that is indented below an unindented line is verbatim.
    """
    paragraphs: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        before = paragraphs[-1] if paragraphs else ""
        if re.match(r"\s*(>>>|\.\. )", paragraph) or (paragraph.startswith(" ") and before.startswith(".. ")):
            paragraphs.append(paragraph)
        elif paragraph.startswith("  ") and not before.rpartition("\n")[2].startswith(" "):
            paragraphs += [".. code-block:: text", paragraph]
        else:
            paragraphs.append(escaped(paragraph))
    for field in getattr(obj, "__dataclass_fields__", {}).values() if what == "class" else ():
        if text := field.metadata.get("help"):
            paragraphs.append(f":ivar {field.name}: {escaped(text() if callable(text) else text)}")
    lines[:] = "\n\n".join(paragraphs).split("\n")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstring_to_rst, priority=100)  # before napoleon, which has 500
