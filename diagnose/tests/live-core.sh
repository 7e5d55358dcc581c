#!/bin/sh
# Whether dump tools say the same of a live.core as of the whole dump that it was made of.
#
#   live-core.sh DUMP KERNEL-LAYER VMLINUX [MODULE.ko...]
#
# DUMP: an ELF dump of a guest that stands at a hook (QEMU's dump-guest-memory); KERNEL-LAYER: the compiled
# layer of its kernel. Uses $LIVE_CORE (default: target/release/examples/live_core), $CRASH (crash), and
# $DRGN_PYTHON (python3), a Python that has drgn. A tool that is not installed is skipped, and it says so.
# Exit code: 0 all agree, 1 something differs, 2 usage.
set -u
[ $# -ge 3 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
dump=$1 layer=$2 vmlinux=$3
shift 3
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT INT TERM
failed=0

"${LIVE_CORE:-target/release/examples/live_core}" "$dump" "$layer" "$work/live.core" || exit 1

if command -v "${CRASH:-crash}" >/dev/null 2>&1; then
    printf '%s\n' 'set scroll off' sys ps bt 'bt -a' mod log exit >"$work/commands"
    for file in "$dump" "$work/live.core"; do
        name=$(basename "$file")
        timeout 300 "${CRASH:-crash}" -s -i "$work/commands" "$vmlinux" "$file" >"$work/$name.all" 2>&1
        grep -v 'DUMPFILE: ' "$work/$name.all" >"$work/$name.txt"
    done
    if ! grep -q 'RELEASE: ' "$work/$(basename "$dump").txt"; then
        echo "crash: SKIPPED, it can't open the whole dump either: $(head -1 "$work/$(basename "$dump").txt")"
    elif diff "$work/$(basename "$dump").txt" "$work/live.core.txt"; then
        echo "crash: $(wc -l <"$work/live.core.txt") lines, the same"
    else
        echo "crash: DIFFERENT"; failed=1
    fi
else
    echo "crash: SKIPPED, not installed"
fi

if "${DRGN_PYTHON:-python3}" -c 'import drgn' 2>/dev/null; then
    timeout 300 "${DRGN_PYTHON:-python3}" - "$work/live.core" "$vmlinux" "$@" <<'PYTHON' || { echo "drgn: FAILED"; failed=1; }
import sys

import drgn
from drgn.helpers.linux import for_each_task
from drgn.helpers.linux.printk import get_dmesg

program = drgn.Program()
program.set_core_dump(sys.argv[1])
try:
    program.load_debug_info(sys.argv[2:])
except drgn.MissingDebugInfoError:
    pass  # modules without debug information
crashed = program.crashed_thread()
names = [frame.name for frame in crashed.stack_trace()]
tasks = list(for_each_task(program))
unwound = 0
for task in tasks:
    try:
        unwound += len(program.stack_trace(task)) > 1
    except (ValueError, LookupError, drgn.FaultError) as error:
        print(f"drgn: stack of {task.pid.value_()}: {error}")
modules = [module for module in program.modules() if isinstance(module, drgn.RelocatableModule)]
log = get_dmesg(program)
print(f"drgn: crashed task {crashed.tid}, {len(names)} frames: {' < '.join(map(str, names))}")
print(f"drgn: {len(tasks)} tasks, {unwound} with a stack; {len(modules)} modules; {len(log)} bytes of log")
user = sum(frame is not None for frame in names) < 2
sys.exit(user or len(tasks) < 10 or unwound < len(tasks) - 2 or b"Linux version" not in log)
PYTHON
else
    echo "drgn: SKIPPED, not installed"
fi
exit $failed
