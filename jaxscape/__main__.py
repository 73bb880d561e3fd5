import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current directory, whose json.py or random.py would take the place of Python's own

from jaxscape.cli.main import main

main()
