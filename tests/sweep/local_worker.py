"""A worker that does what its work's title says, for tests of the local engine; it starts much faster than torch."""

import json
import os
import subprocess
import sys
import time

work = json.loads(sys.stdin.readline())
act, _, rest = work["title"].partition(" ")
row = {"pid": os.getpid(), "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "threads": os.environ["OMP_NUM_THREADS"]}
if act == "crash":
    print("first line\nSegfault in kernel", file=sys.stderr)
    os._exit(3)
if act == "killed":
    os.kill(os.getpid(), 9)
if act == "family":  # a child that would stay
    child = subprocess.Popen(["sleep", "600"])
    with open(rest, "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    child.wait()
row["start"] = time.monotonic()
time.sleep(float(rest or 0) if act == "sleep" else 0)
row["end"] = time.monotonic()
print(json.dumps({"rows": [row], "error": "", "out_of_memory": False}))
