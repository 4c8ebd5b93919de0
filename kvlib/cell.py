"""The cell command an engine calls, any number of times: lock, skip or resume, papermill, verify.

    python -m kvlib.cell --notebook notebooks/30_run.ipynb --folder runs/... --config '{"seed": 0, ...}'

Exit codes: 0 a valid record is there, 1 an error in the notebook, 2 a bad config, 65 no record,
138 the kernel died. It and its kernel die with the process that started it.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from kvlib.config import RunConfig
from kvlib.errors import ConfigError
from kvlib.record import RecordError, explained, is_done, locked, notebook_sha256, sha256

NOTEBOOK_ERROR, BAD_CONFIG, NO_RECORD, KERNEL_DIED = 1, 2, 65, 138


class NotebookError(RuntimeError):
    """A notebook that did not run to its end; `code` is the exit code that says why."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.cell", description="Run one cell, or finish it.")
    parser.add_argument("--notebook", required=True, help="the parameterised notebook")
    parser.add_argument("--folder", required=True, help="where the cell's samples and record go")
    parser.add_argument("--config", required=True, help="the RunConfig as JSON")
    arguments = parser.parse_args()
    die_with_parent()
    try:
        run_cell(Path(arguments.notebook).absolute(), Path(arguments.folder).absolute(), arguments.config)
    except ConfigError as error:
        return failed(BAD_CONFIG, error)
    except RecordError as error:
        return failed(NO_RECORD, error)
    except NotebookError as error:
        return failed(error.code, error)
    return 0


def failed(code: int, error: Exception) -> int:
    print(f"kvlib.cell: {error}", file=sys.stderr, flush=True)
    return code


def run_cell(notebook: Path, folder: Path, config_json: str) -> None:
    """Bring folder to a valid record of this config; raises ConfigError, RecordError or NotebookError."""
    from kvlib.run import check, run_fingerprint

    config = read_config(config_json)
    code = notebook_sha256(notebook)
    os.chdir(notebook.parent)  # relative paths mean the same here, in the kernel and in JupyterLab
    check(config)
    fingerprint = run_fingerprint(config, code)
    with contextlib.ExitStack() as held:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock"))
        if is_done(folder, fingerprint):
            print(f"{folder} is done already", flush=True)
            return
        command = ["python", "-m", "kvlib.cell", "--notebook", notebook.name, "--folder", config.cell_path]
        environment = {
            "OMP_NUM_THREADS": str(config.threads),
            "MKL_NUM_THREADS": str(config.threads),
            "MPLBACKEND": "agg",
            "KVLIB_COMMAND": shlex.join(command),
        }
        parameters = {**config.parameters(), "folder": str(folder), "notebook_sha256": code}
        check_parameters(notebook, parameters)
        trouble = None
        try:
            execute_notebook(notebook, folder / "run.ipynb", parameters, environment)
        except NotebookError as error:
            trouble = error
        if not is_done(folder, fingerprint):
            raise trouble or NotebookError(
                NO_RECORD, f"{notebook.name} ran to its end, yet {folder} holds no valid record of this "
                "config; see run.ipynb there")  # fmt: skip
        print(f"{folder} is done" + (f", although {trouble}" if trouble else ""), flush=True)


def read_config(text: str) -> RunConfig:
    try:
        parameters = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--config is not JSON ({error}); quote it as one shell word") from error
    return RunConfig.from_parameters(parameters)


def check_parameters(notebook: Path, names, exactly: bool = True) -> None:
    """Raise ConfigError unless the notebook's parameters cell sets these names and, if exactly, no other."""
    import papermill

    try:
        found = set(papermill.inspect_notebook(unformatted(notebook)))
    except Exception as error:  # papermill and nbformat raise a dozen kinds
        raise ConfigError(f"{notebook} is no notebook that papermill can read: {error}") from error
    lacks, extra = sorted(set(names) - found), sorted(found - set(names))
    if lacks:
        raise ConfigError(f"{notebook.name} does not take {', '.join(lacks)}; give each a line in its cell "
                          "tagged parameters (papermill skips a line whose comment holds '=')")  # fmt: skip
    if extra and exactly:
        raise ConfigError(f"{notebook.name} has a parameter that nothing sets: {', '.join(extra)}; remove it")


def execute_notebook(notebook: Path, output: Path, parameters: dict, environment: dict) -> None:
    """Run a notebook with these parameters in this very Python; the executed copy goes to output.

    Its folder is the working folder. Raises ConfigError on a name it does not take, NotebookError otherwise.
    """
    check_parameters(notebook, parameters, exactly=False)
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python", env=environment)

    class ThisPython(AsyncKernelManager):
        kernel_spec = spec  # a user's own "python3" kernel may be another interpreter

    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"  # a socket's path is short
    prefix = f"kv-{sha256(str(output).encode())[:10]}-"
    for left_over in Path(base).glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=base, ignore_cleanup_errors=True) as sockets:
        try:
            papermill.execute_notebook(
                unformatted(notebook),
                unformatted(output),
                parameters=parameters,
                kernel_name="python3",
                kernel_manager_class=ThisPython,
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/k"}}),
                cwd=notebook.parent,
                progress_bar=False,
                start_timeout=120,
            )
        except papermill.PapermillExecutionError as error:
            what = " ".join(f"{error.ename}: {error.evalue}".split())
            raise NotebookError(NOTEBOOK_ERROR, f"{what} (see {output})") from error
        except DeadKernelError as error:
            raise NotebookError(KERNEL_DIED, f"the kernel of {output} died: killed, or out of memory") from error
        except OSError as error:
            raise NotebookError(NOTEBOOK_ERROR, f"{output} cannot be written: {error.strerror or error}") from error
        except RuntimeError as error:
            raise NotebookError(KERNEL_DIED, f"the kernel of {output} did not start: {error}") from error


def unformatted(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill puts paths through str.format


def die_with_parent() -> None:
    """Exit within half a second once the process that started this one is gone, whatever killed it.

    Polls, as ipykernel does: the kernel's death signal follows the parent's thread, not its process.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
