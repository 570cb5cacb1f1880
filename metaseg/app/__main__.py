"""Label a few images in the browser, adapt, and see the masks of the others.

python -m metaseg.app --init RUN/init.safetensors
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from metaseg.errors import ConfigError, UserError, WeightsError
from metaseg.practice import Initialisation, load

LAST_PORT = 65_535


def interruptible() -> None:
    """Let the end of the process, or of its terminal, interrupt it as Ctrl-C does: at once, it leaves files behind."""
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP

    def interrupt(*_: object) -> None:
        for number in ending:  # a terminal may send more than one: the removing of files is not to be interrupted
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ending:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)


def serve(init: Initialisation, host: str, port: int) -> None:
    """Serve the page until the process is interrupted or terminated; what visitors have left is removed then.

    Raises:
        ConfigError: if Gradio is missing, or the port cannot be had.
    """
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host  # as addresses have IPv6's
    interruptible()
    with tempfile.TemporaryDirectory(prefix="metaseg-", ignore_cleanup_errors=True) as folder:
        uploads, sessions = Path(folder, "uploads"), Path(folder, "sessions")
        uploads.mkdir()
        sessions.mkdir()
        _settle(uploads)
        try:
            from metaseg.app import page
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise ConfigError('the page needs Gradio: pip install "metaseg-lightning[app]"') from error
        from starlette.middleware import Middleware  # comes with Gradio

        from metaseg.app.guard import MAX_FILE, Guard, is_local

        blocks = page.build(init, sessions)
        try:
            blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                max_file_size=MAX_FILE,
                app_kwargs={"middleware": [Middleware(Guard, uploads=uploads, local=is_local(host))]},
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                theme=page.THEME,
                css=page.CSS,
            )
        except OSError as error:
            other = port + 1 if port < LAST_PORT else port - 1
            raise ConfigError(
                f"nothing can be served at {host}:{port}, which may be taken: choose another port, --port {other}"
            ) from error
        print(f"http://{host}:{port} is the page; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            page.ended.set()
            blocks.close(verbose=False)


def _settle(uploads: Path) -> None:
    """Set what Gradio takes from the environment, at its import and later; what was set there is not for this page."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # they may open other folders, ports and services
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # Gradio serves what is in it
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # the browser would keep it
    os.environ["no_proxy"] = "*"  # Gradio asks whether the page is there: a proxy would look for it on its own computer


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        "python -m metaseg.app",
        description="Label a few images in the browser, adapt, and see the masks of the others.",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="init.safetensors of a run; default: the one that `make demo` has built",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve at: 0.0.0.0 is for whoever reaches this computer, without a password; "
        "default: %(default)s, this computer alone",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        if not 1 <= arguments.port <= LAST_PORT:
            raise ConfigError(f"--port {arguments.port}: ports are 1 … {LAST_PORT}; without --port it is 7860")
        init = load(arguments.init)
        if "_target_" not in init.about.update:
            raise WeightsError(
                "the initialisation recommends no update procedure: give --init, the init.safetensors of a run"
            )
        serve(init, arguments.host, arguments.port)
    except UserError as error:
        sys.exit(f"metaseg: {error}")


if __name__ == "__main__":
    main()
