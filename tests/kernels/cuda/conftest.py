"""Triton's programs without a GPU: compiled for one that is not there, or run by its interpreter.

Triton decides when it is imported whether there is an interpreter, so that these tests have a process of their own.
"""

import os

collect_ignore = [] if os.environ.get('TRITON_INTERPRET') == '1' else ['test_interpreted.py']
