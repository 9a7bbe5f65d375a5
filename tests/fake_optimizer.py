# ruff: noqa: T201 - what it prints is read by the server
"""A stand-in for ``headrace optimize --background``: notes how it runs, and ends as it is told to.

``fake_optimizer.py NOTES BEHAVIOUR MODEL``. It has nothing of ours to import, so that it starts at once.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

notes, behaviour, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
child = None
if behaviour in ("hang", "slow"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with notes.open("a") as file:
    note = {
        "model": model,
        "pid": os.getpid(),
        "child": child.pid if child is not None else 0,
        "policy": os.sched_getscheduler(0),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "session": os.getsid(0),
        "group": os.getpgid(0),
    }
    file.write(json.dumps(note) + "\n")
print('headrace-progress: {"done": 1, "of": 3}', flush=True)
if behaviour == "crash":
    print("Traceback (most recent call last):", file=sys.stderr)
    print("headrace: the moon is full", file=sys.stderr)
    sys.exit(1)
elif behaviour == "abort":
    os.abort()
elif behaviour == "nothing_better":
    sys.exit(3)
elif behaviour == "hang":
    time.sleep(600)
elif behaviour == "slow":
    sys.exit(0)  # and its child goes on
elif behaviour.startswith("copy "):  # FROM TO: a plan that was made before
    shutil.copytree(*behaviour.split()[1:], dirs_exist_ok=True)
elif behaviour == "garbage":
    noise = bytes(range(256)) * 4096
    for _ in range(20):
        sys.stdout.buffer.write(noise + b"\n")
        sys.stderr.buffer.write(noise)
    print("headrace-progress: {not json")
    print("headrace-progress: " + "[" * 5000)
    print("headrace-progress: [1]", flush=True)
    sys.exit(7)
