"""A griffe extension: the docstrings' roles, such as :class:`~package.module.Name`, are links in the API reference."""

import re

import griffe

ROLE = re.compile(r':(?:class|func|data|meth|mod|attr):`(~?)([\w.]+)`')


class Roles(griffe.Extension):
    """Turn what is written for Sphinx into what mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Change the docstring of each object."""
        if obj.docstring:
            text = re.sub(r'::(\n\n {4})', r':\1', obj.docstring.value)
            obj.docstring.value = ROLE.sub(self.link, text)

    @staticmethod
    def link(match: re.Match) -> str:
        """`[Name][]` if the name is a whole path of ours, and code otherwise."""
        shown = match[2].rpartition('.')[2] if match[1] else match[2]
        return f'[`{shown}`][{match[2]}]' if match[2].startswith('mmdyn.') else f'`{shown}`'
