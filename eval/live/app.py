"""The page `emocache app`: give a clip, see what the model saw of it, ask, watch the answer being written.

    with LiveModel.load(run) as model, AppServer(model, limits) as server:
        print(server.url)
        server.serve_forever()

Gradio draws the page and carries questions and answers. Clips take a way of their own (`eval.live.uploads`),
so that no file of this machine has an address and none is kept.
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cache.errors import EmocacheError, MissingDependencyError, SchemaError
from eval.live.guard import Guard
from eval.live.jobs import JobLine
from eval.live.page import TEMPLATES, Example, Page, theme
from eval.live.uploads import BusyError, PageLimits, TooLargeError, Uploads
from eval.origins import LOOPBACK

if TYPE_CHECKING:
    from eval.live.answer import LiveModel

logger = logging.getLogger(__name__)

_TIDY_S = 30.0


class AppServer:
    """Serves the page of one model. A context manager: leaving it deletes what people gave.

    Args:
        model: Who looks and answers.
        limits: How much the page takes on.
        host: Address to listen on.
        port: 0 takes a free one.
        transcribe: Whether what is said is written down where nobody gives a subtitle.
        examples: Clips to offer; or what makes them in a folder that goes with the server.
        about: What the page says of the run, in a few words.

    Raises:
        SchemaError: The address cannot be listened on.
        MissingDependencyError: Gradio is not installed.
    """

    def __init__(
        self,
        model: LiveModel,
        limits: PageLimits | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        transcribe: bool = False,
        examples: Sequence[Example] | Callable[[Path], Sequence[Example]] = (),
        about: str = "",
    ) -> None:
        self.limits = limits or PageLimits()
        self._host = host
        self._socket = _listen(host, port)
        self.uploads = Uploads(self.limits)
        self.line = JobLine(self.limits.concurrency, self.limits.max_waiting)
        try:
            made = examples(self.uploads.folder / "examples") if callable(examples) else examples
            self._examples = tuple(made)
            page = Page(model, self.uploads, self.line, transcribe, self._examples, about)
            self._app = Guard(self._routes(page), host)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        if host in ("0.0.0.0", "[::]"):
            host = socket.gethostname()
        return f"http://{host}:{self._socket.getsockname()[1]}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self._host in LOOPBACK

    def serve_forever(self) -> None:
        """Answer until Ctrl-C or a termination signal, which raise KeyboardInterrupt."""
        import uvicorn

        guard = self._app

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                guard.end()
                await super().shutdown(sockets)

        config = uvicorn.Config(
            self._app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=256,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=5,
        )
        # uvicorn stops serving at SIGTERM, and sends it once more when it has: then we clean up.
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        Server(config).run(sockets=[self._socket])

    def close(self) -> None:
        """Stop all jobs and delete what people gave."""
        try:
            self.line.close()
        finally:  # also if somebody is tired of waiting for it
            self.uploads.close()
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _routes(self, page: Page) -> Any:
        """Return the application: our routes, and Gradio's behind them."""
        gradio = _gradio(self.uploads.folder)
        from fastapi import FastAPI, Request
        from fastapi.responses import FileResponse, JSONResponse
        from starlette.requests import ClientDisconnect

        @asynccontextmanager
        async def living(_: FastAPI) -> AsyncIterator[None]:
            async def tidy() -> None:
                while True:
                    await asyncio.sleep(_TIDY_S)
                    self.uploads.tidy()

            task = asyncio.create_task(tidy())
            yield
            task.cancel()

        app = FastAPI(lifespan=living, docs_url=None, redoc_url=None, openapi_url=None)

        async def receive(request: Request) -> JSONResponse:
            length = request.headers.get("content-length")
            try:
                upload_id = await self.uploads.receive(
                    request.stream(), int(length) if length and length.isdecimal() else None
                )
            except EmocacheError as error:
                status = {TooLargeError: 413, BusyError: 503}.get(type(error), 422)
                return JSONResponse({"error": str(error)}, status)
            except ClientDisconnect:  # the sender went on to something else
                return JSONResponse({}, 400)
            except OSError as error:
                logger.warning("a clip cannot be stored: %s", error)
                return JSONResponse(
                    {"error": "The clip cannot be stored here: the disk is full?"}, 507
                )
            return JSONResponse({"id": upload_id})

        async def forget(upload_id: str) -> JSONResponse:
            page.forget(upload_id)
            return JSONResponse({})

        async def example(number: int) -> Any:
            if number >= len(self._examples):
                return JSONResponse({"error": "there is no such example"}, 404)
            path = self._examples[number].path
            return FileResponse(path, media_type=mimetypes.guess_type(path.name)[0])

        # The annotations of this module are texts, which FastAPI cannot resolve to local names.
        receive.__annotations__ = {"request": Request}
        app.add_api_route("/clips", receive, methods=["POST"], response_model=None)
        app.add_api_route(
            "/clips/{upload_id}/forget", forget, methods=["POST"], response_model=None
        )
        app.add_api_route("/examples/{number}", example, methods=["GET"], response_model=None)
        return gradio.mount_gradio_app(
            app,
            page.blocks(gradio),
            path="/",
            theme=theme(gradio),
            css=(TEMPLATES / "app.css").read_text(encoding="utf-8"),
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=False,
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        words = getattr(error, "strerror", None) or error
        raise SchemaError(
            f"cannot listen on --host {host} --port {port}: {words}. --port 0 takes a free port."
        ) from None
    return found


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _gradio(folder: Path) -> Any:
    """Return Gradio, told to ask nobody on the network and to write nowhere but here.

    Raises:
        MissingDependencyError: It is not installed.
    """
    # Read when Gradio is imported, and later.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError(
            "The page needs gradio: pip install 'emocache[app]'"
        ) from error
    return gradio
