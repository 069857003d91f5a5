"""How mkdocs sees the repository: Markdown outside of docs/ is part of the site, and links are as on the disk.

All pages link to each other, and to configs and sources, by relative paths of the repository, so that they work
wherever the files are read. The site has the pages of docs/ at its root, the README as its first page, and the other
files at their paths. A page of the nav that is not written (yet) is left out.
"""

import os
import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
README = 'README.md'
LINK = re.compile(r'(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(\))|(<img [^>]*src=")(?!\w+:)([^"]+)(")')


def pages(root: Path = ROOT) -> list[str]:
    """The Markdown outside of docs/ that belongs to the site, as paths in the repository."""
    found = [root / README, root / 'CHANGELOG.md', root / 'CONTRIBUTING.md', *sorted(root.glob('configs/*/README.md'))]
    return [path.relative_to(root).as_posix() for path in found]


def place_of(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == README:
        return 'index.md'
    return path.removeprefix('docs/')


def target_of(page: str, link: str, root: Path = ROOT) -> str | None:
    """The file of the repository that a relative link of a page leads to; None if there is none."""
    path = os.path.normpath(PurePosixPath(page).parent / link)
    if (root / path).is_dir():
        path = f'{path}/{README}'
    return path if not path.startswith('..') and (root / path).is_file() else None


def links(text: str) -> list[str]:
    """The relative links and images of a page's Markdown, but for those in its code blocks."""
    text = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    return [match[2] or match[6] for match in LINK.finditer(text)]


def relink(text: str, page: str, root: Path = ROOT) -> str:
    """A page whose links are as the site has the files."""

    def change(match):
        target = target_of(page, match[2] or match[6], root)
        if target is None:
            return match[0]  # mkdocs complains of it
        place = os.path.relpath(place_of(target), PurePosixPath(place_of(page)).parent)
        return ''.join([match[1], place, match[3] or '', match[4]] if match[1] else [match[5], place, match[7]])

    return LINK.sub(change, text)


def repository_path(src_uri: str, root: Path = ROOT) -> str:
    """The file of the repository that a file of the site is made of."""
    if src_uri == 'index.md':
        return README
    return f'docs/{src_uri}' if (root / 'docs' / src_uri).is_file() else src_uri


def existing(nav: list) -> list:
    """The nav without pages that there are not."""
    kept = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: existing(target)})
        elif (ROOT / repository_path(target)).is_file():
            kept.append(entry)
    return kept


def on_config(config):
    """Leave out of the nav what is not written."""
    config.nav = existing(config.nav)
    return config


def on_files(files, config):
    """Add the Markdown outside of docs/, and the files that pages link to."""
    from mkdocs.structure.files import File

    own = [f'docs/{file.src_uri}' for file in files.documentation_pages()]
    others = pages()
    for page in [*others, *own]:
        targets = [target_of(page, link) for link in links((ROOT / page).read_text())]
        others += [target for target in targets if target and not target.startswith('docs/') and target not in others]
    for path in others:
        files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links."""
    return relink(markdown, repository_path(page.file.src_uri))
