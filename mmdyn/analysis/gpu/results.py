"""Keep what was found on a GPU in one file, which is whole whenever the machine goes away.

tools/gpu_check.sh runs this file after each of its steps, also after one that could not install mmdyn's foundations: so
it imports nothing but Python's own.

usage: results.py RESULTS step NAME SECONDS CODE    keep how a step ended
       results.py RESULTS tests NAME JUNIT_XML      keep what pytest --junitxml wrote of a step
       results.py RESULTS traces FOLDER             keep the profile.json of profile_pass.py
"""

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[3]


def save(file: Path, section: str, value) -> None:
    """Write a section of the file and leave the others as they are."""
    found = json.loads(file.read_text()) if file.exists() else {}
    fresh = file.with_name(f'.{file.name}')
    fresh.write_text(json.dumps({**found, section: value}, indent=1) + '\n')
    os.replace(fresh, file)


def load(file: Path, section: str, default):
    """A section of the file, or what stands for it when there is none yet."""
    return json.loads(file.read_text()).get(section, default) if file.exists() else default


def short(error) -> str:
    """The first line of an error, without this machine's folders."""
    return str(error).strip().split('\n')[0].replace(f'{ROOT}/', '')[:300]


def tests_of(junit: Path) -> dict:
    """How many tests passed, failed and were skipped, and what was said of those that failed.

    Args:
        junit: what pytest --junitxml wrote.
    """
    found = dict(passed=0, failed=0, skipped=0, failures={})
    for case in ElementTree.parse(junit).iter('testcase'):
        wrong = [child for child in case if child.tag in ('failure', 'error')]
        kind = 'failed' if wrong else 'skipped' if case.find('skipped') is not None else 'passed'
        found[kind] += 1
        if wrong:
            found['failures'][f'{case.get("classname")}::{case.get("name")}'] = short(wrong[0].get('message'))
    return found


def main(argv: list[str] | None = None) -> None:
    """Keep what the arguments name; see above."""
    file, what, *rest = argv or sys.argv[1:]
    file = Path(file)
    try:
        if what == 'step':
            name, seconds, code = rest
            added = {name: dict(seconds=int(seconds), code=int(code))}
        elif what == 'tests':
            name, junit = rest
            added = {name: tests_of(Path(junit))}
        elif what == 'traces':
            added = {
                f'{entry["model"]} {entry["shape"]} {entry["dtype"]}': entry
                for entry in json.loads(Path(*rest, 'profile.json').read_text())
            }
        else:
            raise ValueError(f'{what}: give step, tests or traces.')
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise SystemExit(f'results.py: nothing to keep of {what} {rest[0]}: {error}') from error
    save(file, what, {**load(file, what, {}), **added})


if __name__ == '__main__':
    main()
