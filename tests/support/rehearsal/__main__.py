"""`python -m tests.support.rehearsal` and what `sfgrpo` is told."""

from sfgrpo import cli

if __name__ == "__main__":
    raise SystemExit(cli.main())
