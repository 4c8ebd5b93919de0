"""The cell command an engine calls, any number of times: lock, skip or resume, papermill, verify.

    python -m kvlib.study.cell_command --notebook notebooks/30_run.ipynb --folder runs/... --config '{"seed": 0, ...}'

Exit codes: 0 a valid record is there, 1 an error in the notebook, 2 a bad config, 65 no record, 77 no room on the
GPU, 124 over the time limit, 138 the kernel died. What is not 0 leaves failed.json, which the next attempt removes:
fingerprint, code, reason, utc. The cell and its kernel die with the process that started them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from kvlib.config import RunConfig
from kvlib.errors import ConfigError, GpuMemoryError
from kvlib.files import write_atomically
from kvlib.record import RecordError, is_done, locked, sha256, utc_now
from kvlib.study.gpus import leased_gpu
from kvlib.study.processes import TIED, NotebookError, die_with_parent, failed

NOTEBOOK_ERROR, BAD_CONFIG, NO_RECORD, NO_MEMORY, TIMED_OUT, KERNEL_DIED = 1, 2, 65, 77, 124, 138


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvlib.study.cell_command", description="Run one cell, or finish it."
    )
    parser.add_argument("--notebook", required=True, help="the parameterised notebook")
    parser.add_argument("--folder", required=True, help="where the cell's samples and record go")
    parser.add_argument("--config", required=True, help="the RunConfig as JSON")
    limit = os.environ.get("KVLIB_TIME_LIMIT")
    parser.add_argument("--time-limit", type=positive, default=limit, help="seconds; default: KVLIB_TIME_LIMIT or none")
    parser.add_argument("--attempt", type=positive, default=1, help="the engine's count; default: %(default)s")
    parser.add_argument("--parent", type=int, help="the process to die with; default: the one that started this")
    given = parser.parse_args()
    die_with_parent(given.parent or os.getppid())
    notebook, folder = Path(given.notebook).absolute(), Path(given.folder).absolute()
    try:
        run_cell(notebook, folder, given.config, given.time_limit, given.attempt)
    except (ConfigError, RecordError, NotebookError) as error:
        code = {ConfigError: BAD_CONFIG, RecordError: NO_RECORD}.get(type(error)) or error.code
        return failed(code, f"kvlib.study.cell_command: {error}")
    return 0


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def run_cell(notebook: Path, folder: Path, config_json: str, time_limit: int | None = None, attempt: int = 1) -> None:
    """Bring folder to a valid record of this config; raises ConfigError, RecordError or NotebookError.

    time_limit: seconds. A later attempt of one engine does not repeat what the GPU had no room for.
    """
    from kvlib.cell import prepare  # torch

    config = read_config(config_json)
    os.chdir(notebook.parent)  # relative paths mean the same here, in the kernel and in JupyterLab
    fingerprints = prepare(config).fingerprints
    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder / ".lock"))
        known = read_failure(folder)
        (folder / "failed.json").unlink(missing_ok=True)
        if is_done(folder, fingerprints):
            print(f"{folder} is done already", flush=True)
            return
        command = ["python", "-m", "kvlib.study.cell_command", "--notebook", notebook.name]
        command += ["--folder", config.cell_path]
        environment = {
            "OMP_NUM_THREADS": str(config.threads),
            "MKL_NUM_THREADS": str(config.threads),
            "MPLBACKEND": "agg",
            "KVLIB_COMMAND": shlex.join(command),
        }
        parameters = {**dataclasses.asdict(config), "folder": str(folder)}
        check_parameters(notebook, parameters)
        trouble = None
        try:
            if attempt > 1 and (known.get("code"), known.get("fingerprint")) == (NO_MEMORY, fingerprints[0]):
                raise NotebookError(NO_MEMORY, known["reason"])
            gpu, inherited = held.enter_context(leased_gpu()) if config.device == "cuda" else ({}, ())
            environment |= gpu
            execute_notebook(notebook, folder / "run.ipynb", parameters, environment, inherited, time_limit)
        except NotebookError as error:
            trouble = error
        if is_done(folder, fingerprints):
            print(f"{folder} is done" + (f", although {trouble}" if trouble else ""), flush=True)
            return
        trouble = trouble or NotebookError(
            NO_RECORD, f"{notebook.name} ran to its end, yet {folder} holds no valid record of this config; see "
            "run.ipynb there")  # fmt: skip
        note_failure(folder, {"fingerprint": fingerprints[0], "code": trouble.code, "reason": str(trouble)})
        raise trouble


def read_failure(folder: Path) -> dict:
    """What the last attempt left of a failure, {} if it left none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "failed.json").read_text())
    return {}


def note_failure(folder: Path, failure: dict) -> None:
    with contextlib.suppress(OSError):  # a full disk is a likely reason; the message is printed too
        write_atomically(folder / "failed.json", json.dumps({**failure, "utc": utc_now()}, indent=1).encode())


def read_config(text: str) -> RunConfig:
    try:
        parameters = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--config is not JSON ({error}); quote it as one shell word") from error
    if not isinstance(parameters, dict):
        raise ConfigError(f"a mapping of parameters is needed, got {parameters!r}")
    return RunConfig(**parameters)


def check_parameters(notebook: Path, names, exactly: bool = True) -> None:
    """Raise ConfigError unless the notebook's parameters cell sets these names and, if exactly, no other."""
    import papermill

    if not notebook.exists():
        raise ConfigError(f"there is no {notebook}, through which cells run; have the grid file beside kvlib's "
                          "notebooks, in notebooks/")  # fmt: skip
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


def execute_notebook(
    notebook: Path,
    output: Path,
    parameters: dict,
    environment: dict,
    inherited: tuple[int, ...] = (),
    time_limit: int | None = None,
) -> None:
    """Run a notebook with these parameters in this very Python; the executed copy goes to output.

    Its folder is the working folder. inherited: descriptors that its kernel holds too. time_limit: seconds that one
    notebook cell may take, after which the kernel is stopped. Raises ConfigError on a name it does not take,
    NotebookError otherwise.
    """
    check_parameters(notebook, parameters, exactly=False)
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    # ipykernel's own watch forgets a parent that dies before the kernel is up.
    argv = [sys.executable, "-c", TIED, str(os.getpid()), "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python", env=environment)

    class ThisPython(AsyncKernelManager):
        kernel_spec = spec  # a user's own "python3" kernel may be another interpreter

        async def start_kernel(self, **options):
            await super().start_kernel(pass_fds=inherited, **options)

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
                execution_timeout=time_limit,
            )
        except papermill.PapermillExecutionError as error:
            what = " ".join(f"{error.ename}: {error.evalue}".split())
            code = NO_MEMORY if error.ename == GpuMemoryError.__name__ else NOTEBOOK_ERROR
            raise NotebookError(code, f"{what} (see {output})") from error
        except CellTimeoutError as error:  # an OSError too
            why = f"{output} was stopped at its time limit of {time_limit} s; run again to continue from its samples"
            raise NotebookError(TIMED_OUT, why) from error
        except DeadKernelError as error:
            raise NotebookError(KERNEL_DIED, f"the kernel of {output} died: killed, or out of memory") from error
        except OSError as error:
            raise NotebookError(NOTEBOOK_ERROR, f"{output} cannot be written: {error.strerror or error}") from error
        except RuntimeError as error:
            raise NotebookError(KERNEL_DIED, f"the kernel of {output} did not start: {error}") from error


def unformatted(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill puts paths through str.format


if __name__ == "__main__":
    sys.exit(main())
