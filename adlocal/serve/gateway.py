"""The gateway: from what a client asks to what it is shown, and to what is remembered of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from ..errors import InputError
from ..plugin import Control
from ..servers.addresses import is_loopback
from ..settings import Settings
from . import admission, upstream
from .admission import Request
from .asked import Asked
from .config import Config, default_settings, pepper
from .engine import Engine
from .events import Event, Failed, Usage
from .keys import Keys, open_keys
from .limits import Limiter
from .merged import merged
from .metrics import Metrics
from .model import Model, read_model
from .policy import Caller, Decision, decide, kinds_of, least
from .protocols import Route
from .single import Applied, Shown, Single
from .slots import Slots
from .state import Store, default_directory, open_store
from .tags import opens_hidden
from .watch import Level, Watch, open_log, read_settings
from .watched import observations, outcome

LOG = logging.getLogger(__name__)


@dataclass
class Charge:
    """What a request has used.

    Attributes:
        tokens: of all that was read and written.
    """

    tokens: int = 0


class Gateway:
    """All that one `adlocal serve` holds. Use in one event loop, as an asynchronous context manager.

    Args:
        config: what to serve, and how.

    Raises:
        InputError: model, bundle or engine are not there, or cannot be used.

    Attributes:
        config: in force.
        model, default: the teacher, and the bundle's own settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.default: Settings = default_settings(config)
        self.model: Model = read_model(config)
        self.floor = least(config.policy, self.default)
        self.metrics = Metrics()
        limits = config.limits
        self.slots = Slots(
            config.engine.parallel,
            queue=limits.queue,
            queue_per_key=limits.queue_per_key,
            queue_seconds=limits.queue_seconds,
        )
        self.engine = Engine(config, self.floor, self._engine_started, self._engine_ended)
        self._exits = contextlib.AsyncExitStack()
        self._client: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> Gateway:
        """Opens what it needs and starts the engine.

        Raises:
            AdlocalError: something of it cannot be had.
        """
        secret = pepper(self.config)
        async with contextlib.AsyncExitStack() as exits:
            self.store: Store = await open_store(self.config.state)
            exits.push_async_callback(self.store.close)
            self.keys: Keys = await open_keys(self.store, secret)
            self.asks_for_keys = await self._asks_for_keys()
            self._refuse_open_door()
            self.limiter = await exits.enter_async_context(Limiter(self.store))
            settings = read_settings(self.config.watch)
            state = self.config.state or str(default_directory())
            self.watch = Watch(settings, open_log(state, settings.capacity.records))
            await self.watch.open()
            exits.push_async_callback(self.watch.close)
            exits.push_async_callback(self.engine.stop)
            await self.engine.start()
            observer = asyncio.create_task(self._observe())
            exits.callback(observer.cancel)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    @property
    def client(self) -> httpx2.AsyncClient:
        """Of the engine.

        Raises:
            Failed: there is none now.
        """
        if self._client is None:
            raise Failed(503, "unavailable_error", "the engine is starting again; try again", retry_after=5)
        return self._client

    @property
    def is_well(self) -> bool:
        """Whether requests that come now will be answered."""
        return self.engine.control is not None and not self._is_stalled()

    @property
    def control(self) -> Control | None:
        """The engine's control file; None where there is no engine now."""
        return self.engine.control

    @property
    def reuses(self) -> bool:
        """Whether a key may go on with what it left in a slot: not where embeddings may have taken its place."""
        return self.config.engine.pooling is None

    def reload(self, config: Config) -> None:
        """Puts another policy and other limits of requests in force, from the next request on.

        Raises:
            InputError: it asks for what takes a new start; nothing has changed.
        """
        for name in sorted(Config.model_fields.keys() - {"policy", "limits", "log_text"}):
            if getattr(config, name) != getattr(self.config, name):
                raise InputError(f"{name} has changed, which needs a new start of adlocal serve; nothing was changed")
        asked = least(config.policy, self.default)
        if asked.strength < self.floor.strength or asked.guard > self.floor.guard:
            raise InputError(
                f"the policy now asks for as little as strength {asked.strength:g} and guard {asked.guard:g}, and the "
                f"engine was started with no less than {self.floor.strength:g} and {self.floor.guard:g}; "
                "start adlocal serve again"
            )
        read_model(config)  # reasoning that can be hidden, if it is to be now
        self.config = config
        self.slots.limit(config.limits.queue, config.limits.queue_per_key, config.limits.queue_seconds)

    def decide(self, caller: Caller, asked: Asked) -> Decision:
        """What policy says to it."""
        return decide(self.config.policy, caller, kinds_of(asked), self.default)

    async def admit(self, caller: Caller, asked: Asked, user: str | None, steering: bool = False) -> Request:
        """Takes a request in; `finish` must follow.

        Args:
            user: for whom the caller asks, as a trusted one says.
            steering: tell what was steered; for the operator.

        Raises:
            Failed: policy or a limit refuses it.
        """
        decision = self.decide(caller, asked)
        admission.permit(asked, decision)
        admission.bounded(asked, self.slots.most)
        asked = admission.cleaned(asked, self.model, decision)
        level = await self._watched(caller, asked, decision, user)
        if level.action == "block":
            raise Failed(403, "permission_error", "this key is blocked for now; ask the operator")
        if level.action == "throttle":
            raise Failed(429, "rate_limit_error", "this key is slowed down for now; try again later", retry_after=60)
        settings = admission.raised(decision, level)
        prompts = [str(each) for each in asked.prompts] or [str(asked.messages)]
        tokens = admission.tokens_at_most(prompts, asked.n, upstream.n_predict(asked, decision))
        reservation = await self.limiter.reserve(admission.subjects(caller, decision), tokens)
        identity = secrets.token_hex(12)
        return Request(identity, caller, asked, decision, settings, level, user, steering, reservation)

    async def _watched(self, caller: Caller, asked: Asked, decision: Decision, user: str | None) -> Level:
        """What the watch makes of it: of several prompts, each is a request, and the highest level holds for all."""
        seen = observations(caller, asked, decision, user, self.model)
        levels = [await self.watch.admit(observation) for observation in seen]
        return max(levels, key=lambda level: (level.action == "block", level.action == "throttle", level.position))

    async def answers(self, request: Request) -> AsyncGenerator[Event]:
        """What the client is shown. Closing it hangs up on the engine.

        Raises:
            Failed: it cannot be answered, or not to its end.
        """
        asked, decision = request.asked, request.decision
        prompts = await self._prompts(request)
        for i, body in enumerate(upstream.bodies(asked, decision)):
            prompt = prompts[i // asked.n]
            shown = Shown(
                decision.disclosure,
                self.model.tags,
                starts_hidden=admission.starts_hidden(asked, decision, opens_hidden(prompt, self.model.tags)),
                thinks=admission.thinks(asked, decision),
                stop=asked.stop,
                steering=request.steering,
            )
            applied = Applied(i, request.settings)
            request.singles.append(Single(request.caller.key, body, prompt, shown, applied))
        streams = [single.events(self.slots, self) for single in request.singles]
        async with contextlib.aclosing(merged(streams)) as events:
            async for event in events:
                yield event

    async def finish(self, request: Request) -> None:
        """Charges a request and remembers it, however it ended."""
        applied = [single.applied for single in request.singles]
        n_tokens = sum(each.n_prompt + each.n_tokens for each in applied)
        await self.limiter.settle(request.reservation, n_tokens)
        for each in applied:
            self.metrics.applied(each)
        await self.watch.finished(outcome(request))

    def usage(self, request: Request) -> Usage:
        """Tokens as the client is told of them: what is hidden without a word does not count."""
        applied = [single.applied for single in request.singles]
        hides = request.decision.disclosure == "answer-only"
        return Usage(
            sum(each.n_prompt for each in applied[:: request.asked.n]),
            sum(each.n_tokens - (each.n_hidden if hides else 0) for each in applied),
        )

    async def rendered(self, asked: Asked, decision: Decision) -> str:
        """A chat as the engine reads it.

        Raises:
            Failed: its template refuses it.
        """
        found = await upstream.ask(self.client, upstream.TEMPLATE, upstream.template(asked, decision))
        return str(found["prompt"])

    def unknown_fields(self, caller: Caller, route: Route = "chat") -> Literal["ignore", "refuse"]:
        """What becomes of fields of its bodies that nobody knows."""
        return self.decide(caller, Asked("completion" if route == "completions" else "chat")).unknown

    @contextlib.asynccontextmanager
    async def charged(self, caller: Caller, tokens: int = 0) -> AsyncGenerator[Charge]:
        """Charges a request that is answered at once; `tokens` are reserved.

        Raises:
            Failed: a limit refuses it.
        """
        decision = self.decide(caller, Asked("completion"))
        reservation = await self.limiter.reserve(admission.subjects(caller, decision), tokens)
        charge = Charge()
        try:
            yield charge
        finally:
            await self.limiter.settle(reservation, charge.tokens)

    def measured(self) -> bytes:
        """For Prometheus."""
        now = time.time()
        self.metrics.deferred.set(self.slots.n_waiting)
        self.metrics.processing.set(self.slots.n - self.slots.n_idle)
        self.metrics.score.found = {row.subject: row.score for row in self.watch.table(now)}
        return self.metrics.text()

    def watched(self) -> list[dict[str, Any]]:
        """The watch's table."""
        return [dataclasses.asdict(row) for row in self.watch.table(time.time())]

    async def _prompts(self, request: Request) -> list[str]:
        """Every prompt as the engine reads it."""
        asked = request.asked
        if asked.kind == "chat":
            return [await self.rendered(asked, request.decision)]
        return [each if isinstance(each, str) else await self._text(each) for each in asked.prompts]

    async def _text(self, tokens: Sequence[int]) -> str:
        return str((await upstream.ask(self.client, "/detokenize", {"tokens": list(tokens)}))["content"])

    def _is_stalled(self) -> bool:
        return self.engine.is_stalled(self.slots.n_idle < self.slots.n)

    async def _observe(self) -> None:
        """Looks at the engine's progress, whether or not somebody asks for it."""
        while True:
            await asyncio.sleep(1)
            self._is_stalled()

    def _refuse_open_door(self) -> None:
        host = self.config.listen.host
        if not self.asks_for_keys and not is_loopback(host):
            raise InputError(
                f"--host {host}: others could ask without a key; make keys with `adlocal keys add --owner NAME`, "
                "or listen on 127.0.0.1"
            )

    async def _asks_for_keys(self) -> bool:
        if self.config.keys is not None:
            return self.config.keys
        return bool(await self.keys.records())

    def _engine_started(self) -> None:
        self._client = self.engine.client()
        self.metrics.starts.inc()
        self.slots.open()

    def _engine_ended(self) -> None:
        self._client = None  # its connections are used once, and none is kept
        self.slots.close()
