"""The engine: a server under the plugin, started on a private socket, watched, and started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import httpx2

from ..errors import AdlocalError
from ..plugin import Control
from ..settings import Settings
from .config import Config
from .engine_command import command, end_with_parent, environment

LOG = logging.getLogger(__name__)
_LAST_LINES = 40
_PAUSES = (0.5, 1.0, 2.0, 5.0, 15.0)  # seconds before it is started again: for each start that failed in a row
_TERMINATE_SECONDS = 10.0
_USED_ONCE = httpx2.Limits(max_keepalive_connections=0)


class Engine:
    """One engine after the other, of the same model and bundle.

    Args:
        config: model, bundle and engine are used.
        floor: the least that it protects with, whatever the gateway asks.
        on_start, on_end: are called when it can be asked, and when it has ended.

    Attributes:
        control: its control file; None while there is none.
    """

    def __init__(
        self, config: Config, floor: Settings, on_start: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        self._config, self._floor = config, floor
        self._on_start, self._on_end = on_start, on_end
        self._directory = tempfile.TemporaryDirectory(prefix="adlocal-serve-")
        self._key = secrets.token_hex(32)
        self._process: asyncio.subprocess.Process | None = None
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._ended = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._progress = (0, 0.0)
        self.control: Control | None = None

    @property
    def socket(self) -> Path:
        """Where it listens: in a directory that nobody else can enter."""
        return Path(self._directory.name) / "engine.sock"

    def client(self) -> httpx2.AsyncClient:
        """A client of it, which whoever asks for it closes. A connection is used once: it ends idle ones unasked."""
        return httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=str(self.socket), limits=_USED_ONCE),
            base_url="http://engine",
            headers={"Authorization": f"Bearer {self._key}"},
            timeout=httpx2.Timeout(None, connect=10.0),
            trust_env=False,
        )

    async def start(self) -> None:
        """Starts it, and keeps it running from then on.

        Raises:
            AdlocalError: it does not start; its last words are in the message.
        """
        await self._start()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Ends it, and whoever restarts it."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._terminate()
        self._directory.cleanup()

    def is_stalled(self, working: bool) -> bool:
        """Whether it has had something to do for too long without finishing a batch. To be asked every second or so.

        Args:
            working: whether there are requests that it works on.
        """
        done = self.control.decodes().ended if self.control is not None else 0
        now = time.monotonic()
        if not working or done != self._progress[0]:
            self._progress = done, now
        return now - self._progress[1] > self._config.engine.stall_seconds

    async def _start(self) -> None:
        """Starts one process, and ends it again where it is no use."""
        self.socket.unlink(missing_ok=True)
        self._lines.clear()
        self._ended.clear()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *command(self._config, self._floor, Path(self._directory.name), self._key_file()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environment(),
                start_new_session=True,  # Ctrl-C is ours to pass on, when requests have ended
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise AdlocalError(f"the engine cannot be started ({error.strerror})") from None
        self._reader = asyncio.create_task(self._read_log(process))
        try:
            async with asyncio.timeout(self._config.engine.start_seconds):
                await self._wait(process)
            control = Control.open(Path(self._directory.name) / f"{process.pid}.control")
        except TimeoutError:
            await self._terminate()
            seconds = self._config.engine.start_seconds
            raise AdlocalError(f"the engine did not start within {seconds:g} s; {self._last_words()}") from None
        except BaseException:
            await self._terminate()
            raise
        self.control = control
        LOG.info("engine ready", extra={"pid": process.pid})
        self._on_start()

    def _key_file(self) -> Path:
        """What it asks of us, where no argument shows it."""
        path = Path(self._directory.name) / "key"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(self._key + "\n")
        return path

    async def _wait(self, process: asyncio.subprocess.Process) -> None:
        """Until it answers that it is well."""
        async with self.client() as client:
            while True:
                if process.returncode is not None:
                    raise AdlocalError(f"the engine ended with status {process.returncode}; {self._last_words()}")
                with contextlib.suppress(httpx2.TransportError):
                    if (await client.get("/health", timeout=5.0)).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        try:
            while process.stdout is not None and (line := await _line(process.stdout)):
                self._lines.append(line)
                LOG.debug("engine: %s", line)
        finally:
            await process.wait()
            if process is self._process:
                self._ended.set()

    async def _keep(self) -> None:
        while True:
            await self._ended.wait()
            self.control = None
            status = self._process and self._process.returncode
            LOG.error("engine ended", extra={"status": status, "log": self._words()})
            self._on_end()
            await self._restart()

    async def _restart(self) -> None:
        n_failed = 0
        while True:
            await asyncio.sleep(_PAUSES[min(n_failed, len(_PAUSES) - 1)])
            try:
                return await self._start()
            except AdlocalError as error:
                n_failed += 1
                LOG.error("engine does not start", extra={"error": str(error)})

    async def _terminate(self) -> None:
        """Ends the process and its children, gently first."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        for number, seconds in ((signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, _TERMINATE_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), seconds)
                return

    def _last_words(self) -> str:
        return f"its last words: {self._words()}" if self._lines else "it said nothing"

    def _words(self) -> str:
        return " | ".join(list(self._lines)[-5:])


async def _line(stream: asyncio.StreamReader) -> str:
    """The next line, without its end; "" at the end of the stream. Of a line that is too long, parts."""
    try:
        found = await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        found = error.partial
    except asyncio.LimitOverrunError as error:
        found = await stream.read(error.consumed)
    return found.decode(errors="replace").rstrip("\n") or (" " if found else "")
