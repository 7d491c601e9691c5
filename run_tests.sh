#!/usr/bin/env bash
# Every test. Sets itself up: .venv, unless an environment is active (whose torch stays as it is), and the small model.
#
#   bash run_tests.sh                        all tests, about half an hour on two cores
#   bash run_tests.sh -m "not real and not distributed"     the quick ones; arguments go to pytest
#
# One process runs the tests one after another: the distributed ones start processes of their own.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
set_up requirements-dev.txt
"$PYTHON" -m tools.fetch_small_model
exec "$PYTHON" -m pytest --timeout 900 --durations 10 "$@"
