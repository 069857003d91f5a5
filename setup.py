import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'mmdyn/version.py').read_text()).group(1)

setup(name='mmdyn', version=VERSION, packages=find_packages(include=('mmdyn', 'mmdyn.*')))
