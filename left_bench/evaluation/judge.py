"""A language model as judge: does it prefer the adapted model's answer to the base model's? (`eval.judge`)

Any server with OpenAI's chat completions API can be used. Each pair is shown twice, in both orders, because judges have
a position bias (Zheng et al. 2023, "Judging LLM-as-a-Judge"); how often both orders give the same verdict is reported
too.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import SplitResult, urlsplit

from left_bench.core.errors import UserError
from left_bench.spec.cell import Cell
from left_bench.spec.record import Score

_SECONDS = 120.0  # timeout of one reply
_ATTEMPTS, _PAUSE_SECONDS = 4, 1.0  # retries for a busy server; the pause doubles
_AT_ONCE = 4
_LONGEST_REPLY = 2**20  # bytes
_SECRET_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_VERDICT = re.compile(r"\[\[\s*(A|B|C)\s*\]\]", re.IGNORECASE)
_PROMPT = """Which of two answers is the better one? Judge by correctness first, then by how well the answer does what
was asked. Do not let the order, the length or the style decide. A reference answer is given to compare with.

[Question]
{question}

[Reference]
{reference}

[Answer A]
{a}
[End of answer A]

[Answer B]
{b}
[End of answer B]

Explain in a sentence or two, then end with your verdict: [[A]] if A is better, [[B]] if B is, [[C]] for a tie."""


class JudgeFailed(RuntimeError):
    """The judge gave no usable verdicts; the message is one sentence."""


def check(cell: Cell) -> None:
    """Refuse, before anything runs, cells that cannot be judged and keys that must not be sent.

    Raises:
        UserError: names the key and what it needs.
    """
    section = cell.eval
    if section.judge is None:
        return
    where = f"eval.judge={section.judge}"
    address = _address(section.judge)
    if address is None:
        raise UserError(f"{where}: is not an address; give one such as eval.judge=http://127.0.0.1:8000/v1")
    if section.judge_model is None:
        raise UserError(f"{where}: the judge's model is not set; give eval.judge_model=NAME")
    if not cell.generates:
        raise UserError(f"{where}: it compares generated answers, and this cell generates none")
    if cell.model.weights == "random":
        raise UserError(f"{where}: answers of model.weights=random are not worth judging; leave one of the two out")
    if section.judge_key_from is not None:
        if not _SECRET_NAME.fullmatch(section.judge_key_from):
            raise UserError("eval.judge_key_from: give the name of the environment variable with the key, not the key")
        if not os.environ.get(section.judge_key_from):
            raise UserError(f"eval.judge_key_from={section.judge_key_from}: there is no such environment variable")
        if address.scheme == "http" and not _is_here(address):
            raise UserError(f"{where}: the key would be sent unencrypted; give an address with https")


def what_leaves(cell: Cell) -> str | None:
    """What a cell sends to its judge, in one line; None if it has none."""
    if cell.eval.judge is None:
        return None
    rows = cell.eval.judge_rows if cell.eval.rows is None else min(cell.eval.judge_rows, cell.eval.rows)
    address = _address(cell.eval.judge)
    place = "a server on this machine" if address is not None and _is_here(address) else "another machine"
    key = f", with the key in {cell.eval.judge_key_from}" if cell.eval.judge_key_from else ""
    return (
        f"note: eval.judge sends up to {rows} held-out rows of each cell to {cell.eval.judge} ({place}{key}): "
        "question, reference, the base model's answer and the adapted model's"
    )


def _address(text: str) -> SplitResult | None:
    try:
        address = urlsplit(text)
        return address if address.scheme in ("http", "https") and address.hostname and address.port != 0 else None
    except ValueError:
        return None


def _is_here(address: SplitResult) -> bool:
    host = address.hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def judge_answers(
    cell: Cell,
    rows: Sequence[Any],
    answers: Sequence[str],
    base_answers: Sequence[str],
    *,
    tell: Callable[[str, int, int], None],
) -> tuple[list[Score], dict[str, float]]:
    """How often the judge prefers an answer to the base model's, and how often it agrees with itself.

    Equal answers are a tie and are not sent. A row counts if both orders ended in a verdict.

    Returns:
        The scores, and facts for the record: rows judged, and how often both orders agreed.

    Raises:
        JudgeFailed: the server could not be reached, or gave no verdict at all.
    """
    triples = list(zip(rows, answers, base_answers, strict=True))[: cell.eval.judge_rows]
    different = [triple for triple in triples if triple[1] != triple[2]]
    questions = []
    for row, answer, before in different:
        questions += [_request(row, answer, before), _request(row, before, answer)]
    verdicts: list[str | None] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for verdict in pool.map(_Judge(cell).verdict, questions):
            verdicts.append(verdict)
            tell("judge", len(verdicts), len(questions))
    wins, agreed = [0.5] * (len(triples) - len(different)), []
    value = {"A": 1.0, "B": 0.0, "C": 0.5}
    for first, second in zip(verdicts[::2], verdicts[1::2], strict=True):
        if first is None or second is None:
            continue
        shown_first, shown_second = value[first], 1 - value[second]
        wins.append((shown_first + shown_second) / 2)
        agreed.append(float(shown_first == shown_second))
    if different and not agreed:
        raise JudgeFailed(f"{cell.eval.judge_model} ended none of its replies with [[A]], [[B]] or [[C]]")
    facts = {"judged_rows": float(len(wins))}
    if agreed:
        facts["judge_agreement"] = math.fsum(agreed) / len(agreed)
    mean = math.fsum(wins) / len(wins)
    spread = math.sqrt(math.fsum((win - mean) ** 2 for win in wins) / len(wins))
    error = spread / math.sqrt(len(wins))
    return [Score(task=cell.data.name, metric="judge_win_rate", value=mean, stderr=error, n=len(wins))], facts


def _request(row: Any, a: str, b: str) -> str:
    return _PROMPT.format(question=row.prompt, reference=row.reference, a=a, b=b)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Judge:
    """A judging server; several threads send it one question at a time each."""

    def __init__(self, cell: Cell) -> None:
        section = cell.eval
        assert section.judge is not None
        self._url, self._model = f"{section.judge.rstrip('/')}/chat/completions", section.judge_model
        self._variable = section.judge_key_from
        self._key = os.environ.get(self._variable, "") if self._variable else ""
        if self._variable and not self._key:
            raise JudgeFailed(f"the environment variable {self._variable} is not set")
        self._opener = urllib.request.build_opener(_NoRedirect())

    def verdict(self, question: str) -> str | None:
        """`A`, `B` or `C`; None if the reply contains none of them."""
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        reply = self._sent(json.dumps(body).encode())
        try:
            text = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeFailed(
                self._without_key(f"{self._url} replied with no chat completion: {reply[:200]!r}")
            ) from error
        result = _VERDICT.findall(str(text))
        return str(result[-1]).upper() if result else None

    def _sent(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "left_bench"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(_ATTEMPTS):
            try:
                request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
                with self._opener.open(request, timeout=_SECONDS) as reply:
                    return bytes(reply.read(_LONGEST_REPLY))
            except urllib.error.HTTPError as error:
                text = " ".join(error.read(500).decode("utf-8", errors="replace").split())
                if error.code not in (408, 429, 500, 502, 503, 504) or attempt == _ATTEMPTS - 1:
                    raise JudgeFailed(self._without_key(f"{self._url} answered {error.code}: {text}")) from None
            except (OSError, ValueError) as error:
                if attempt == _ATTEMPTS - 1:
                    raise JudgeFailed(self._without_key(f"{self._url} cannot be reached ({error})")) from None
            time.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, f"[{self._variable}]") if self._key else text
