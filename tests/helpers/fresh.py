"""New processes for the tests, without the seconds that their imports cost.

Each pytest process forks a server before it imports agsm_loss. The server has imported the other
libraries, and forks what the tests ask for: nothing of ours is loaded there, no shape annotation is
executed, and Python's state is as at its start.
"""

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

CONTEXT = multiprocessing.get_context("fork")
LIBRARIES = [
    "accelerate",
    "datasets",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.unets.unet_2d_condition",
    "peft",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
]
"""Those whose import takes long; some are missing where the core is tested alone."""
_server = SimpleNamespace()


def preload():
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def begin(whole_suite):
    """Forks the server. whole_suite: the libraries are imported first, for both."""
    if whole_suite:
        preload()
    _server.folder, _server.number = tempfile.mkdtemp(), itertools.count()
    _server.pipe, theirs = CONTEXT.Pipe()
    _server.process = CONTEXT.Process(target=_serve, args=(theirs, _server.pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are not used there
        _server.process.start()
    theirs.close()


def end():
    """Ends the server, if one has begun."""
    if hasattr(_server, "process"):
        _server.pipe.close()
        _server.process.join()
        shutil.rmtree(_server.folder)


def _serve(pipe, other):
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running = {}
    with contextlib.suppress(EOFError):
        while True:
            asked = pipe.recv()
            if isinstance(asked, int):
                pipe.send(running[asked].exitcode)
                continue
            preload()  # if it was not done before
            process = CONTEXT.Process(target=_child, args=(pipe, *asked))
            process.start()
            running[process.pid] = process
            pipe.send(process.pid)
    os._exit(0)


def _child(pipe, payload, environment, path, folder, files, leads):
    pipe.close()
    if leads:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(number, "w"), write_through=True))
    importlib.reload(warnings)  # pytest records them, and makes them errors
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    function, arguments = pickle.loads(payload)
    function(*arguments)


class Started:
    """A process that calls `function(*arguments)`, with the part of Popen that the tests use.

    leads: it is a session of its own. environment: over that of pytest.
    """

    def __init__(self, function, *arguments, leads=False, **environment):
        number = next(_server.number)
        self._files = [f"{_server.folder}/{number}.{kind}" for kind in ("out", "errors")]
        payload = pickle.dumps((function, arguments))
        environment = os.environ | environment
        _server.pipe.send((payload, environment, sys.path, os.getcwd(), self._files, leads))
        self.pid = _server.pipe.recv()
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            _server.pipe.send(self.pid)
            self.returncode = _server.pipe.recv()
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """What it has told and its errors, after its end."""
        until = time.monotonic() + (timeout or 600)
        while self.poll() is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 600, *self.told())
            time.sleep(0.02)
        return self.told()

    def told(self):
        return tuple(Path(file).read_text() for file in self._files)


def run(function, *arguments, **settings):
    """What the function has written, after it; an error if it fails."""
    process = Started(function, *arguments, **settings)
    told, errors = process.communicate()
    assert process.returncode == 0, f"{told}\n{errors}"
    return SimpleNamespace(told=told, errors=errors)


# What can be run so.


def script(file, *arguments):
    """As `python FILE ARGUMENTS`."""
    sys.argv = [str(file), *map(str, arguments)]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(str(file), run_name="__main__")


def module(name, *arguments):
    """As `python -m NAME ARGUMENTS`; the processes that it launches are forked as well."""
    from torch.distributed import run as of_torch

    made = of_torch.config_from_args

    def forking(args):
        config, _, command = made(args)
        config.start_method = "fork"
        assert command[0] == "-u", command
        return config, script, command[1:]

    of_torch.config_from_args = forking
    sys.argv = [name, *map(str, arguments)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def code(text, *arguments):
    """As `python -c TEXT ARGUMENTS`."""
    sys.argv = ["-c", *map(str, arguments)]
    exec(text, {"__name__": "__main__"})  # noqa: S102
