"""The pages of the project, and the command lines in them."""

import re
from pathlib import Path

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
PAGES = [
    path.relative_to(ROOT)
    for pattern in ('*.md', 'docs/*.md', 'docs/api/*.md', 'configs/*/README.md')
    for path in sorted(ROOT.glob(pattern))
]
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.DOTALL | re.MULTILINE)


def text_of(page):
    return (ROOT / page).read_text()


def blocks(language, pages=PAGES):
    """(page, code) of each block of a language."""
    return [(page, code) for page in pages for name, code in FENCE.findall(text_of(page)) if name == language]


def command_lines(text):
    """The lines of a shell block, without comments and continued ones joined."""
    text = re.sub(r' *\\\n *|\n +(?=\[?--)', ' ', text)
    lines = (re.sub(r'(^|\s)#.*', '', line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def commands(text):
    """The commands of a shell block: those of its lines, each by itself."""
    return [part for line in command_lines(text) for part in re.split(r'\s(?:&&|\|)\s', line)]


def inline_commands(page):
    """What is written as a command within the text of a page."""
    for code in re.findall(r'(?<!`)`([^`]+)`(?!`)', FENCE.sub('', text_of(page))):
        code = re.sub(r'\s+', ' ', code)
        if re.match(r'([A-Z_]+=\S+ )*(python|mim|make|bash|pip)\s', code):
            yield from commands(code)


def all_commands():
    """(page, command) of all blocks, and of what is written inline as a command."""
    for page, code in blocks('bash'):
        yield from ((page, command) for command in commands(code))
    for page in PAGES:
        yield from ((page, command) for command in inline_commands(page))
