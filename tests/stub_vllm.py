"""A stand-in for a running vLLM: its HTTP interface for chats with image embeds, over transformers' own `generate`."""

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tiny_families import load_reference
from transformers import AutoTokenizer

MODEL = "served"  # the name by which it is asked for its model


class StubVllm:
    """Answers as vLLM 0.32 does, from a LLaVA of a folder, and keeps the bodies of requests.

    trusting   whether it was started with --trust-request-chat-template
    key        with --api-key
    preamble   what its own chat template writes ahead of the prompt
    refusals   a word in a prompt -> (status, message) that it answers with
    """

    def __init__(self, folder: Path, root: str | None = None) -> None:
        self.root, self.trusting, self.key, self.preamble = root or str(folder), False, "", ""
        self.refusals: dict[str, tuple[int, str]] = {}
        self.bodies: list[dict[str, Any]] = []
        self._model = load_reference(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
        if self._template is None:
            self._template = (folder / "chat_template.jinja").read_text()
        self._image = self._model.config.image_token_id
        self._lock = threading.Lock()
        self.app = Starlette(
            routes=[Route("/v1/models", self._models), Route("/v1/chat/completions", self._chat, methods=["POST"])]
        )

    async def _models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"data": [{"id": MODEL, "root": self.root}]})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if "chat_template" in body and not self.trusting:
            return _error(400, "Chat template is passed with request, but --trust-request-chat-template is not set.")
        text = self._prompt(body)
        for word, (status, message) in self.refusals.items():
            if word in text:
                return _error(status, message)
        return await run_in_threadpool(self._answer, body, text)

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    def _prompt(self, body: dict[str, Any]) -> str:
        (message,) = body["messages"]
        content = [item if item["type"] == "text" else {"type": "image"} for item in message["content"]]
        text = self._tokenizer.apply_chat_template(
            [{"role": message["role"], "content": content}],
            chat_template=body.get("chat_template", self._template),
            add_generation_prompt=True,
            tokenize=False,
            **body.get("chat_template_kwargs", {}),
        )
        return text if "chat_template" in body else self.preamble + text

    @torch.inference_mode()
    def _answer(self, body: dict[str, Any], text: str) -> Response:
        images = [item["image_embeds"] for item in body["messages"][0]["content"] if item["type"] == "image_embeds"]
        embeds = [torch.load(io.BytesIO(base64.b64decode(image)), weights_only=True) for image in images]
        with self._lock:
            sizes = iter(len(tensor) for tensor in embeds)
            prompt = [
                token
                for token in self._tokenizer(text, add_special_tokens=body["add_special_tokens"]).input_ids
                for token in [token] * (next(sizes) if token == self._image else 1)
            ]
            ids = torch.tensor(prompt)[None]
            inputs = self._model.get_input_embeddings()(ids)
            inputs[ids == self._image] = torch.cat(embeds).float()
            settings = {"max_new_tokens": body["max_tokens"], "do_sample": body["temperature"] > 0}
            answer = self._model.generate(inputs_embeds=inputs, attention_mask=torch.ones_like(ids), **settings)[0]
            message = {"role": "assistant", "content": self._tokenizer.decode(answer, skip_special_tokens=True)}
        ids_asked_for = body["return_token_ids"]
        choice = {"index": 0, "message": message, "token_ids": answer.tolist() if ids_asked_for else None}
        return JSONResponse({"choices": [choice], "prompt_token_ids": prompt if ids_asked_for else None})


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)
