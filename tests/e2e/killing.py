"""The command line, killed at a given moment."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

# Runs the command line, for each line of its input in a child that ends itself by SIGKILL at the
# given moment (or falls asleep there and says so), and prints the child's exit code.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch._dynamo  # as torch's first optimizer does, for two seconds
import countermark.training.embed_classifier as embed
import countermark.training.loop as train
from countermark.cli import main
from countermark.keys.key import Key
from draws import draw_from, name_draw

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def sleep():
    print("asleep", flush=True)
    time.sleep(120)

def after(place, name, count, then=kill):
    whole, calls = getattr(place, name), []
    def counted(*given, **named):
        done = whole(*given, **named)
        calls.append(done)
        if len(calls) == count:
            then()
        return done
    setattr(place, name, counted)

def before_unlinking(wanted):
    whole = Path.unlink
    def unlink(path, *given, **named):
        kill() if path.name == wanted else whole(path, *given, **named)
    Path.unlink = unlink

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
for line in sys.stdin:
    moment, folder, arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        draw_from(name_draw(moment, *arguments), secrets=moment + ' '.join(arguments))
        exec(moment)
        main(arguments)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Driver:
    """A process that has loaded the command line, and starts it in children to be killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, moment: str, arguments: list[str], folder: Path) -> int:
        """Start the command line, to be disturbed at this moment; its process id."""
        line = json.dumps([moment, str(folder), arguments])
        print(line, file=self.process.stdin, flush=True)
        return int(self.said())

    def killed(self, moment: str, arguments: list[str], folder: Path) -> None:
        """Run the command line until it kills itself at this moment."""
        self.start(moment, arguments, folder)
        assert int(self.said()) == -signal.SIGKILL

    def said(self) -> str:
        """The next line that the driver, or its child, prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()
