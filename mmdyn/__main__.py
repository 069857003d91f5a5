"""`python -m mmdyn`: what a bug report should tell of the machine."""

from .utils import collect_env

if __name__ == '__main__':
    print('\n'.join(f'{name}: {value}' for name, value in collect_env().items()))
