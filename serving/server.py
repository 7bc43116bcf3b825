"""The HTTP server: OpenAI's interface, a page to chat with, health and metrics."""

import asyncio
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from et_moe.serving.http_limits import HttpLimits
from et_moe.serving.openai.chat import Chat
from et_moe.serving.openai.completions import Completion
from et_moe.serving.openai.conversation import rendered
from et_moe.serving.openai.errors import KNOWN, APIError, api_error, bad_request, refusals
from et_moe.serving.openai.events import EventStream, primed, with_errors
from et_moe.serving.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from et_moe.serving.openai.responses import ModelResponse
from et_moe.serving.openai.responses_protocol import ResponsesRequest
from et_moe.serving.page import PAGE_PATHS, add_page
from et_moe.serving.served_model import OpenModel, ServedModel

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)


class _ClientLeft(Exception):
    pass


def create_app(open_model: OpenModel, api_key: str | None = None) -> FastAPI:
    """The application. `app.state.model` is its model while it runs, and `app.state.draining` says
    that it takes no more requests."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.model = model = await open_model()
        yield
        model.guides.close()
        await model.engine.close()

    app = FastAPI(title="et-moe", docs_url=None, redoc_url=None, openapi_url=None,
                  lifespan=lifespan)  # fmt: skip
    app.state.draining = False
    app.add_middleware(
        HttpLimits,
        api_key=api_key,
        open_paths=frozenset({"/health", *PAGE_PATHS}),
        refused=lambda status: app.state.model.metrics.rejected(status),
    )
    _add_errors(app)
    _add_openai(app)
    _add_tokens(app)
    _add_state(app)
    add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    def refuse(request: Request, error: APIError) -> Response:
        request.app.state.model.metrics.rejected(error.status)
        return error.response()

    async def known(request: Request, error: Exception) -> Response:
        return refuse(request, api_error(error))

    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = refuse(request, APIError(error.status_code, message))
        response.headers.update(error.headers or {})  # a 405 says what is allowed
        return response

    async def left(request: Request, error: _ClientLeft) -> Response:
        return Response(status_code=499)

    for kind in KNOWN:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(_ClientLeft, left)


async def _parse(kind: type[Body], request: Request) -> Body:
    """The body of a request, once its model is known to be there."""
    parsed = kind.model_validate_json(await request.body())
    model = request.app.state.model
    asked = getattr(parsed, "model", None)
    if asked is not None and asked != model.name:
        message = f"the model {asked!r} does not exist; this server has {model.name!r}"
        raise APIError(404, message, "model", "model_not_found")
    if request.app.state.draining:
        raise APIError(503, "the server is shutting down", code="shutting_down")
    return parsed


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientLeft
        return task.result()
    finally:
        for future in (task, left):
            future.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _answer(request: Request, kind, body) -> Response:
    """Starts a request of a kind (`Chat`, `Completion` or `ModelResponse`) and gives its answer."""

    async def work() -> Response:
        answer = await kind.start(body, request.app.state.model)
        if not body.stream:
            return JSONResponse(await answer.whole())
        return EventStream(with_errors(answer, await primed(answer.chunks())))

    return await _unless_left(request, work())


def _add_openai(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        return {"object": "list", "data": [_card(request.app.state.model)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict:
        if name != request.app.state.model.name:
            raise APIError(404, f"the model {name!r} does not exist", "model", "model_not_found")
        return _card(request.app.state.model)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, Chat, await _parse(ChatRequest, request))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, Completion, await _parse(CompletionRequest, request))

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await _answer(request, ModelResponse, await _parse(ResponsesRequest, request))


def _card(model: ServedModel) -> dict:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "et-moe",
        "max_model_len": model.engine.engine.info.max_seq_len,
    }


def _add_tokens(app: FastAPI) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await _parse(TokenizeRequest, request)
        return JSONResponse(await asyncio.to_thread(_tokenize, body, request.app.state.model))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await _parse(DetokenizeRequest, request)
        return JSONResponse(await asyncio.to_thread(_detokenize, body, request.app.state.model))

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> dict:
        """What evaluation harnesses want to render conversations themselves; vLLM has it too."""
        model: ServedModel = request.app.state.model
        template = model.template.source if model.template else None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: model.special_tokens.get(name) for name in names}
        return {"chat_template": template, **tokens, **model.special_tokens}


def _tokenize(body: TokenizeRequest, model: ServedModel) -> dict:
    text = body.prompt
    if text is None:
        options = body.chat_template_kwargs or {}
        text = rendered(model, body.messages, body.tools, options, body.add_generation_prompt)
    with refusals("prompt"):
        ids = model.tokenizer.encode(text, True)
    limit = model.engine.engine.info.max_seq_len
    answer = {"count": len(ids), "max_model_len": limit, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [model.token_text(i) for i in ids]
    return answer


def _detokenize(body: DetokenizeRequest, model: ServedModel) -> dict:
    size = model.engine.engine.info.vocab_size
    if not all(0 <= i < size for i in body.tokens):
        raise bad_request(f"tokens: expected ids from 0 to {size - 1}", "tokens")
    return {"prompt": model.decode(body.tokens)}


def _add_state(app: FastAPI) -> None:
    @app.head("/health")  # as some load balancers ask
    @app.get("/health")
    async def health(request: Request) -> Response:
        broken = request.app.state.model.engine.engine.status().broken
        if broken is not None:
            return JSONResponse({"status": "broken", "reason": broken}, 503)
        if request.app.state.draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text = request.app.state.model.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
