#!/usr/bin/env bash
# Every test. Sets itself up: .venv, unless an environment is active (whose torch stays as it is), and the small model.
#
#   bash run_tests.sh                        all tests, about half an hour on two cores
#   bash run_tests.sh -m "not real and not distributed"     the quick ones; arguments go to pytest
#   bash run_tests.sh tests/faults --faults 50                  kills, damage and broken numbers, 50 of each kind
#
# The distributed tests start processes of their own and run one after another; all others run beside each other, a
# process for each core and one thread in each.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
set_up requirements-dev.txt
"$PYTHON" -m tools.fetch_small_model
PYTEST=("$PYTHON" -m pytest --timeout 900 --durations 10)
if [ $# -gt 0 ]; then
    exec "${PYTEST[@]}" "$@"
fi
status=0
OMP_NUM_THREADS=1 "${PYTEST[@]}" -n logical --maxprocesses 8 -m "not distributed" || status=$?
"${PYTEST[@]}" -m distributed || status=$?
exit $status
