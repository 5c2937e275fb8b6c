"""A process that is forked while other threads change the adapters: it neither hangs nor shares."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
"""Fork again and again. Each child must serve its adapters, load, and change nothing of ours."""
import os, signal, sys, tempfile, threading, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
import lora_mux
from tenants import Model, attached, check, tenant
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
tenants = {n: tenant(folder / n, {"first": 4, "second": 4}, i) for i, n in enumerate("abcd")}
memory, forks = sys.argv[2], int(sys.argv[3])
if memory == "bounded":
    model, mux = attached(12)
else:
    model = Model()
    mux = lora_mux.attach(model)
X = torch.randn(2, 12)
mux.load("a", tenants["a"].folder)
mux.load("c", tenants["c"].folder)

def serve(name):
    with mux.route([name, None]):
        check(model, X, [[(tenants[name], 1.0)], []])

def child():
    serve("a")
    mux.load("d", tenants["d"].folder)
    serve("d")
    mux.load("a", tenants["c"].folder, replace=True)
    mux.remove("c")
    with mux.route(["a"]):
        check(model, X[:1], [[(tenants["c"], 1.0)]])
    if "b" in mux.adapters:
        mux.remove("b")
    thread = threading.Thread(target=serve, args=["d"])
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert mux.memory().replaced == 0
    mux.detach()

over = False

def churn():
    while not over:
        mux.load("b", tenants["b"].folder, replace="b" in mux.adapters)
        mux.prefetch(["b"])
        serve("b")

serve("a")
threads = [threading.Thread(target=churn, daemon=True)]
threads[0].start()
bad = []
with mux.route(["c"]):  # the block of the thread that forks
    for i in range(forks):
        time.sleep(0.001 * (i % 7))
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            try:
                with torch.no_grad():
                    check(model, X[:1], [[(tenants["c"], 1.0)]])
                break
            except BaseException as error:
                print("in the block:", repr(error), flush=True)
                os._exit(6)
        _, status = os.waitpid(pid, 0)
        if status:
            bad.append(status)
if pid == 0:
    try:
        child()
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(5)
over = True
threads[0].join(20)
assert list(mux.adapters)[:2] == ["a", "c"] and "d" not in mux.adapters
serve("a")
print("bad:", bad)
sys.exit(bool(bad))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("memory", ["bounded", "all resident"])
def test_children(memory: str, request: pytest.FixtureRequest) -> None:
    forks = 400 if request.config.getoption("--slow") else 20
    support = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-c", SCRIPT, support, memory, str(forks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork stops the threads of OpenMP
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
